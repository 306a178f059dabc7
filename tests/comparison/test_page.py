"""The page of a comparison as a file: what is in it, that it is safe, and how large it gets."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from lmmhooks.comparison.explorer import ABSENT, explorer, quantise
from lmmhooks.comparison.places import Cells
from lmmhooks.geometry import CellGrid, Geometry
from tests.comparison.made import cells, comparison, decoded, run, trace

SIZE = (96, 64)


def data_of(page: str) -> dict:
    """What the script reads."""
    [found] = re.findall(r'<script type="application/json" id="explorer-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def pair():
    first, second = (trace(tokens=5, layers=4, side=6, seed=seed) for seed in (0, 1))
    return comparison([run("baseline", first, size=SIZE), run("x", second, size=SIZE)], SIZE)


def test_bytes_keep_small_values_and_know_what_is_absent() -> None:
    values = torch.tensor([0.0, 1e-4, 0.01, 0.5, 1.0, math.nan])
    stored = quantise(values, 1.0)
    back = [(b / 254) ** 2 for b in stored[:-1]]
    # Half a step of the square root: 1 / 508.
    assert [abs(math.sqrt(a) - math.sqrt(b)) for a, b in zip(values.tolist(), back, strict=False)] == pytest.approx(
        [0] * 5, abs=1 / 508 + 1e-6
    )
    assert stored[-1] == ABSENT
    assert max(stored[:-1]) == 254
    assert quantise(torch.zeros(2), 0.0) == b"\0\0"


def test_maps_come_back_from_the_page(pair, tmp_path) -> None:
    data = data_of(pair.to_html(tmp_path / "page.html").read_text())
    assert data["bands"] == [[0, 3], [0, 0], [1, 1], [2, 2], [3, 3]]
    for made, shown in zip(pair.runs, data["runs"], strict=True):
        within = made.along.within
        image = shown["traces"]["baseline"]["images"][0]
        for band, expected in ((0, within.mean(dim=1)), (2, within[:, 1])):
            most = data["most"][0][band]
            got = decoded(image["data"][band], most).view(5, 36)
            # A step of the square root, near the largest value.
            torch.testing.assert_close(got, expected.double(), rtol=0, atol=2 * most / 254)
        assert shown["traces"]["own"] is None, "its own answer is the baseline's"


def test_all_variants_share_one_range(pair) -> None:
    data = explorer(pair)
    for band, (first, last) in enumerate(data["bands"]):
        both = torch.cat([each.along.within[:, first : last + 1].mean(dim=1).flatten() for each in pair.runs])
        assert data["most"][0][band] == pytest.approx(float(both.max()))
        expected = float(both.quantile(0.99, interpolation="nearest"))
        assert data["ranges"]["baseline"][0][band]["plain"] == pytest.approx(expected, rel=1e-3)
        apart = (pair.runs[1].along.within - pair.runs[0].along.within)[:, first : last + 1].mean(dim=1).abs()
        expected = float(apart.flatten().quantile(0.99, interpolation="nearest"))
        assert data["ranges"]["baseline"][0][band]["apart"] == pytest.approx(expected, rel=1e-3)


def test_equal_runs_differ_nowhere_on_the_page() -> None:
    same = trace(tokens=4, layers=3, side=5)
    data = explorer(comparison([run("baseline", same, size=SIZE), run("x", same, size=SIZE)], SIZE))
    one, other = (entry["traces"]["baseline"] for entry in data["runs"])
    assert one["images"][0]["data"] == other["images"][0]["data"]
    assert other["dlogp"] == [0] * 4
    assert all(band["apart"] == 0 for band in data["ranges"]["baseline"][0])


def test_sinks_are_marked_and_taken_out_of_the_range() -> None:
    led = trace(tokens=3, layers=4, side=6, sink=13)
    data = explorer(comparison([run("baseline", led, size=SIZE)], SIZE))
    shown = data["runs"][0]["traces"]["baseline"]
    assert shown["images"][0]["sinks"] == [13]
    assert shown["num_sinks"] == 1
    within = led.within[..., 13]
    assert shown["sink_share"] == pytest.approx(float(within.mean()), rel=1e-3)
    band = data["ranges"]["baseline"][0][0]
    rest = led.within.mean(dim=1)
    rest[:, 13] = 0
    rest = rest / rest.sum(dim=1, keepdim=True)
    assert band["without"] == pytest.approx(float(rest.flatten().quantile(0.99, interpolation="nearest")), rel=1e-3)
    assert band["plain"] > band["without"]


def test_removed_tokens_carry_their_layer() -> None:
    led = trace(tokens=2, layers=4, side=4)
    visual = led.visual.clone()
    visual[:, 2:, 5] = math.nan
    visual[:, :, 6] = math.nan
    pruned = replace(led, visual=visual)
    data = explorer(comparison([run("baseline", led, size=SIZE), run("x", pruned, size=SIZE)], SIZE))
    image = data["runs"][1]["traces"]["baseline"]["images"][0]
    assert [image["removed"][cell] for cell in (4, 5, 6)] == [4, 2, 0]
    first, last = (decoded(image["data"][band], 1.0).view(2, 16) for band in (1, 4))
    assert not bool(first[:, 5].isnan().any())
    assert bool(last[:, 5].isnan().all())
    assert bool(first[:, 6].isnan().all())


def test_overview_and_tiles_are_one_density() -> None:
    """An overview of one token and four tiles: its value spreads over all of them."""
    box = (0.0, 0.0, 10.0, 10.0)
    overview = CellGrid(torch.tensor([[0]]), box, "base")
    tiles = CellGrid(torch.tensor([[1, 2], [3, 4]]), box, "tiles")
    scale = torch.tensor([0.25, 1, 1, 1, 1], dtype=torch.float64)
    both = Cells(Geometry((10, 10), 5, (overview, tiles)), torch.arange(5), 2, 2, box, scale)
    assert both.merged
    values = torch.tensor([0.4, 0.1, 0.2, 0.3, 0.0])
    expected = (torch.full((2, 2), 0.1) + torch.tensor([[0.1, 0.2], [0.3, 0.0]])) / 2
    torch.testing.assert_close(both.spread(values).float(), expected)
    assert both.covered(torch.tensor([False, True, False, False, False])).tolist() == [[True, False], [False, False]]
    assert bool(both.covered(torch.tensor([True, False, False, False, False])).all())


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_text_of_models_and_data_is_escaped(tmp_path) -> None:
    led = trace(tokens=2, layers=3, side=4, texts=[HOSTILE, "<b>bold</b>"])
    runs = [run("baseline", led, size=SIZE, text=HOSTILE), run(HOSTILE, led, size=SIZE, text=HOSTILE)]
    made = comparison(runs, SIZE, prompt=HOSTILE)
    page = made.to_html(tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>bold" not in page
    assert page.count("<script") == page.count("</script>") == 2
    data = data_of(page)
    assert data["runs"][1]["name"] == HOSTILE, "the script sees the text as it is, and writes it as text"
    assert data["runs"][0]["traces"]["baseline"]["tokens"][0] == HOSTILE


def test_page_asks_for_nothing(pair, tmp_path) -> None:
    page = pair.to_html(tmp_path / "page.html").read_text()
    without_data = re.sub(r"data:image/[^\"]*", "", page)
    assert "http" not in without_data
    assert not re.search(r"<link|@import|url\(|src=\"(?!data:)", without_data)


def test_curves_and_tables_are_there(pair, tmp_path) -> None:
    page = pair.to_html(tmp_path / "page.html").read_text()
    for title in (
        "Attention on the image, difference to the baseline",
        "Entropy, by token",
        "Log-probability of the baseline&#39;s tokens, difference",
        "KL(baseline, variant)",
    ):
        assert title in page, title
    assert page.count("<polygon") == 2 * 4, "system, visual, instruction and generated, for both"
    assert f"{float(pair.runs[1].difference.dlogp.sum()):+.3f}" in page


@pytest.mark.parametrize("own", [False, True])
def test_a_large_answer_stays_small(own, tmp_path) -> None:
    """24 x 24 visual tokens, 32 tokens, 32 layers, a photograph."""
    shape = {"tokens": 32, "layers": 32, "side": 24}
    size = (1600, 1200)
    spoken = trace(**shape, seed=2) if own else None
    runs = [
        run("baseline", trace(**shape), size=size),
        run("x", trace(**shape, seed=1), size=size, own=spoken),
    ]
    path = comparison(runs, size).to_html(tmp_path / "page.html")
    # Noise is the worst photograph there is: it alone takes most of a megabyte.
    assert path.stat().st_size < 3_000_000
    assert len(data_of(path.read_text())["bands"]) > 8, "layers can still be told apart"


def test_long_answers_are_shown_for_all_layers_together() -> None:
    led = trace(tokens=300, layers=3, side=40)
    data = explorer(comparison([run("baseline", led, size=SIZE), run("x", led, size=SIZE)], SIZE))
    assert data["bands"] == [(0, 2)]


def test_nothing_is_drawn_where_the_grid_is_not_known(pair, tmp_path) -> None:
    blind = replace(pair, runs=tuple(replace(each, cells=(None,)) for each in pair.runs))
    data = data_of(blind.to_html(tmp_path / "page.html").read_text())
    assert data["runs"][0]["traces"]["baseline"]["images"] == [None]
    assert data["runs"][0]["traces"]["baseline"]["entropy"]


def test_infinite_numbers_are_said_in_words(pair, tmp_path) -> None:
    led = pair.runs[1].along
    logp, distribution = led.logp.clone(), led.distribution.clone()
    logp[2] = -math.inf
    distribution[2, led.tokens[2]] = -math.inf
    cut = run("x", replace(led, logp=logp, distribution=distribution), size=SIZE)
    made = comparison([pair.runs[0], cut], SIZE)
    page = made.to_html(tmp_path / "page.html").read_text()
    assert "ruled out" in page
    assert "infinite" in page
    assert made.to_dict()["runs"][1]["difference"]["dlogp"][2] is None
    json.dumps(made.to_dict(), allow_nan=False)


def test_cells_of_the_helper_are_a_raster() -> None:
    values = torch.arange(9.0)
    assert cells(3, SIZE).spread(values).flatten().tolist() == values.tolist()
