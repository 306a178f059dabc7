"""The script of a comparison's page, in a real browser: maps follow the slider, the pointer and the controls."""

from __future__ import annotations

import pytest

from tests.comparison.made import comparison, run, trace

SIZE = (320, 240)
SUM = """
(canvas) => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let sum = 0; for (let i = 0; i < data.length; i++) sum = (31 * sum + data[i]) % 1000000007;
  return sum;
}
"""


@pytest.fixture(scope="module")
def page_url(tmp_path_factory) -> str:
    first = trace(tokens=6, layers=8, side=12, sink=30, texts=["A", " tri", "cycle", " on", " grass", ""])
    second = trace(tokens=6, layers=8, side=12, seed=1, sink=31, texts=list(first.texts))
    own = trace(tokens=4, layers=8, side=12, seed=2, texts=["A", " red", " bike", ""])
    runs = [run("baseline", first, size=SIZE), run("fastv(keep=32)", second, size=SIZE, own=own)]
    return comparison(runs, SIZE).to_html(tmp_path_factory.mktemp("compare") / "page.html").as_uri()


class Panels:
    """The two panels of the page."""

    def __init__(self, page) -> None:
        self.page = page

    def pictures(self) -> list[int]:
        return [canvas.evaluate(SUM) for canvas in self.page.locator(".stage canvas").all()]

    def marked(self) -> list[str]:
        return self.page.locator(".token.now").all_inner_texts()

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"#{name}").select_option(value)


@pytest.fixture
def seen(visit, page_url):
    return visit(page_url)


@pytest.fixture
def panels(seen) -> Panels:
    return Panels(seen.page)


def test_the_slider_changes_every_map(seen, panels) -> None:
    before = panels.pictures()
    seen.page.locator("#step").fill("3")
    after = panels.pictures()
    assert len(before) == 2
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert seen.page.locator("#where").inner_text() == "token 4 of 6"
    assert panels.marked() == [" on", " on"]
    seen.assert_quiet()


def test_keys_and_pointer_change_it_too(seen, panels) -> None:
    first = panels.pictures()
    seen.page.keyboard.press("ArrowRight")
    second = panels.pictures()
    assert first != second
    seen.page.keyboard.press("ArrowLeft")
    assert panels.pictures() == first
    seen.page.locator(".token").nth(1).hover()
    assert panels.pictures() == second
    seen.page.mouse.move(2, 2)
    assert panels.pictures() == first, "pointing is a glance; clicking stays"
    seen.page.locator(".token").nth(1).click()
    seen.page.mouse.move(2, 2)
    assert panels.pictures() == second
    seen.assert_quiet()


@pytest.mark.parametrize(("name", "value"), [("band", "3"), ("cells", "exact")])
def test_controls_redraw(name, value, seen, panels) -> None:
    before = panels.pictures()
    panels.choose(name, value)
    assert all(a != b for a, b in zip(before, panels.pictures(), strict=True))
    seen.assert_quiet()


def test_difference_leaves_the_baseline_as_it_is(seen, panels) -> None:
    before = panels.pictures()
    panels.choose("show", "apart")
    after = panels.pictures()
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert seen.page.locator("#least").inner_text().startswith("-")
    seen.assert_quiet()


@pytest.mark.parametrize("name", ["rings", "without"])
def test_sinks_can_be_hidden_and_taken_out(name, seen, panels) -> None:
    before = panels.pictures()
    seen.page.locator(f"#{name}").click()
    assert all(a != b for a, b in zip(before, panels.pictures(), strict=True))
    seen.assert_quiet()


def test_words_join_their_tokens(seen, panels) -> None:
    panels.choose("unit", "words")
    seen.page.locator("#step").fill("1")
    assert panels.marked() == [" tricycle", " tricycle"]
    assert seen.page.locator("#where").inner_text() == "word 2 of 5"
    seen.assert_quiet()


def test_each_may_be_followed_along_its_own_answer(seen, panels) -> None:
    panels.choose("along", "own")
    seen.page.locator("#step").fill("2")
    assert panels.marked() == ["cycle", " bike"]
    seen.page.locator("#step").fill("5")
    assert panels.marked() == ["(end)"], "the shorter answer has ended"
    assert "ended" in seen.page.locator(".said").nth(1).inner_text()
    seen.assert_quiet()


def test_pointing_at_the_image_names_the_cell(seen) -> None:
    box = seen.page.locator(".stage").first.bounding_box()
    seen.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.25)
    for said in seen.page.locator(".at").all_inner_texts():
        assert said.startswith("row 3, column 6: ")
        assert said.rstrip().endswith("of the image's attention")


def test_entropy_can_be_divided(seen) -> None:
    heat = seen.page.locator(".heat canvas").first
    before = heat.evaluate(SUM)
    assert heat.evaluate("canvas => [canvas.width, canvas.height]") == [6, 8]
    seen.page.locator("#divided").click()
    assert seen.page.locator("#entropy-most").inner_text() == "1"
    # ln(144) was the end of the scale before: the same colours, another unit.
    assert heat.evaluate(SUM) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", ["phone", "desktop"])
def test_every_width_and_light(width, scheme, visit, page_url) -> None:
    seen = visit(page_url, width=width, scheme=scheme)
    assert seen.sideways() <= 0
    side_by_side = [panel.bounding_box()["y"] for panel in seen.page.locator(".panel").all()]
    assert (side_by_side[0] == side_by_side[1]) == (width == "desktop")
    contrast, text = seen.least_contrast()
    assert contrast >= 4.5, text
    seen.assert_quiet()
