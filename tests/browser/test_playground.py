"""`lmmhooks playground` as people use it: the real command, a real browser, the bundled model, no network."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.browser.conftest import WIDTHS

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install '.[ui]'"
    )
]


@pytest.fixture(scope="module")
def address(browser) -> Iterator[str]:
    """Of a playground that was started from the command line on any free port."""
    command = [sys.executable, "-m", "lmmhooks.cli.app", "playground", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said: list[str] = []
    try:
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("the playground did not start: " + "".join(said))
        # What it says later must not fill the pipe and hold it up.
        threading.Thread(target=lambda: said.extend(server.stderr or ()), daemon=True).start()
        yield found.group()
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert "Traceback" not in "".join(said)


def opened(visit, address, **kwargs):
    seen = visit(address, **kwargs)
    seen.page.locator("#ask").wait_for()
    return seen


def ask(page, methods: str) -> None:
    page.locator("#scenes button").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value.length > 0")
    page.locator("#methods textarea").fill(methods)
    page.locator("#ask").click()


def test_both_answers_appear_with_pictures_and_cost(visit, address) -> None:
    seen = opened(visit, address)
    ask(seen.page, "fastv(keep=0.25)")
    seen.page.locator("[data-answer=patched] img").wait_for()
    for name in ("baseline", "patched"):
        card = seen.page.locator(f"[data-answer={name}]")
        assert card.locator(".lmm-answer").inner_text().strip()
        assert card.locator("img").evaluate("image => image.complete && image.naturalWidth") >= 224
        assert re.search(r"[01]\.\d{3}", card.locator("table").inner_text())
    pictures = [seen.page.locator(f"[data-answer={name}] img").get_attribute("src") for name in ("baseline", "patched")]
    assert pictures[0] != pictures[1]
    assert seen.page.locator(".lmm-cost tbody tr").count() == 2
    seen.assert_quiet()


def test_an_uploaded_picture_and_ones_own_question(visit, address, tmp_path) -> None:
    Image.radial_gradient("L").resize((300, 120)).save(tmp_path / "picture.png")
    seen = opened(visit, address)
    seen.page.locator("#image input[type=file]").set_input_files(tmp_path / "picture.png")
    seen.page.locator("#image img").wait_for()
    seen.page.locator("#question textarea").fill("Is there a <b>car</b> in the image?")
    seen.page.locator("#methods textarea").fill("vcd")
    seen.page.locator("#ask").click()
    seen.page.locator(".lmm-cost").wait_for()
    seen.assert_quiet()


def test_picking_a_method_writes_it_and_sliders_change_it(visit, address) -> None:
    seen = opened(visit, address)
    seen.page.locator("#chosen input").fill("vcd")
    seen.page.get_by_role("option", name=re.compile("^vcd ")).click()
    written = seen.page.locator("#methods textarea")
    seen.page.wait_for_function("document.querySelector('#methods textarea').value === 'vcd'")
    assert "Tested on" in seen.page.locator("#about").inner_text()
    slider = seen.page.get_by_role("slider", name=re.compile("vcd: alpha"))
    slider.focus()
    slider.press("ArrowRight")
    seen.page.wait_for_function("document.querySelector('#methods textarea').value.includes('alpha=')")
    assert re.fullmatch(r"vcd\(alpha=1\.0\d\)", written.input_value())
    seen.assert_quiet()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("fastv(keep=100000)", "more than the 64 visual tokens"),
        ("fastvv", "did you mean 'fastv'"),
        ("<img src=x onerror=alert(1)>", "cannot read method '<img src=x onerror=alert(1)>'"),
        ("", "no method is picked"),
    ],
)
def test_errors_are_sentences_in_the_page(visit, address, methods, message) -> None:
    seen = opened(visit, address)
    ask(seen.page, methods)
    alert = seen.page.locator(".lmm-problem")
    alert.wait_for()
    assert message in alert.inner_text()
    assert "Traceback" not in seen.page.content()
    seen.assert_quiet()


@pytest.mark.parametrize("width", list(WIDTHS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phones_and_nights(visit, address, width, scheme) -> None:
    seen = opened(visit, address, width=width, scheme=scheme)
    assert seen.sideways() <= 0
    ask(seen.page, "fastv(keep=0.25) + vcd(alpha=0.5)")
    seen.page.locator("[data-answer=patched] img").wait_for()
    assert seen.sideways() <= 0
    seen.assert_quiet()


def test_dark_is_another_page_than_light(visit, address) -> None:
    ink, paper = opened(visit, address, scheme="light").colours()
    night_ink, night_paper = opened(visit, address, scheme="dark").colours()
    assert paper != night_paper
    assert ink != night_ink


def test_stop_leaves_the_model_free(visit, address) -> None:
    seen = opened(visit, address)
    ask(seen.page, "mvp(caption_tokens=400)")
    seen.page.locator("[data-answer=baseline]").wait_for()
    seen.page.locator("#stop").click()
    seen.page.get_by_text("stopped").first.wait_for()
    assert seen.page.locator(".lmm-cost").count() == 0
    seen.page.locator("#methods textarea").fill("vcd")
    seen.page.locator("#ask").click()
    seen.page.locator(".lmm-cost").wait_for()
    assert seen.page.locator(".lmm-problem").count() == 0


def test_the_report_is_in_the_page(visit, address) -> None:
    seen = opened(visit, address)
    ask(seen.page, "fastv(keep=0.25)")
    seen.page.locator(".lmm-cost").wait_for()
    seen.page.get_by_role("button", name=re.compile("^Report")).click()
    assert seen.page.frame_locator("#report iframe").locator("h1").inner_text()
    with seen.page.expect_download() as download:
        seen.page.get_by_role("button", name="Save the report").or_(
            seen.page.get_by_role("link", name="Save the report")
        ).first.click()
    assert download.value.path().read_text().startswith("<!doctype html>")
    seen.assert_quiet()
