"""Pictures and cards hold what the runs say, and no text of users or models as markup."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import lmmhooks
from lmmhooks.comparison import Token
from lmmhooks.playground.rendering import LEAST, MOST, Heat, cards, cost_rows, overlay, problem
from lmmhooks.playground.session import Progress

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def comparison(loaded, scene):
    return lmmhooks.compare(
        loaded.model, loaded.processor, scene.image, scene.question, ["fastv(keep=0.25)"], max_new_tokens=4
    )


def heat(values, kept=None, box=(0.0, 0.0, 112.0, 112.0)) -> Heat:
    values = np.array(values, dtype=np.float64)
    return Heat(values, np.isfinite(values) if kept is None else np.array(kept), box)


def test_overlay_is_brightest_where_the_model_looks() -> None:
    values = np.zeros((4, 4))
    values[1, 2] = 0.5
    picture = np.asarray(overlay(Image.new("RGB", (112, 112), (20, 20, 20)), heat(values), 0.5)).sum(axis=2)
    assert picture.shape == (448, 448)
    row, column = np.unravel_index(picture.argmax(), picture.shape)
    assert (row // 112, column // 112) == (1, 2)
    assert (picture[336:, :112] == 60).all(), "the picture is untouched where nothing is looked at"


def test_removed_tokens_are_grey() -> None:
    seen = heat([[0.1, np.nan], [0.1, 0.1]], box=(0.0, 0.0, 448.0, 224.0))
    picture = np.asarray(overlay(Image.new("RGB", (448, 224), (250, 0, 0)), seen, 0.2)).astype(int)
    assert picture.shape == (224, 448, 3)
    assert np.ptp(picture[20, 400]) < 60
    assert np.ptp(picture[200, 20]) > 100


@pytest.mark.parametrize("size", [(600, 300), (300, 600)])
def test_borders_that_were_cropped_away_stay_as_they_are(size) -> None:
    width, height = size
    left, above = (width - 300) / 2, (height - 300) / 2
    seen = heat(np.full((3, 3), 0.3), box=(left, above, left + 300, above + 300))
    picture = np.asarray(overlay(Image.new("RGB", size, (10, 20, 30)), seen, 0.3))
    assert picture.shape == (height, width, 3)
    assert tuple(picture[1, 1]) == (10, 20, 30)
    assert tuple(picture[height // 2, width // 2]) != (10, 20, 30)


@pytest.mark.parametrize(
    ("size", "box"), [((1, 1), (0, 0, 1, 1)), ((900, 4000), (0, 1550, 900, 2450)), ((100, 50), (0, -25, 100, 75))]
)
def test_extreme_pictures(size, box) -> None:
    picture = overlay(Image.new("RGB", size), heat([[0.0, 1.0]], box=tuple(map(float, box))), 1.0)
    assert LEAST <= max(picture.size) <= MOST


def test_cards_hold_both_answers_pictures_and_cost(comparison) -> None:
    html = cards(Progress(comparison.baseline.text, comparison.runs[1].text, comparison), "fastv(keep=0.25)")
    assert html.count("data:image/png;base64,") == 2
    assert html.count('class="lmm-card"') == 2
    for run in comparison.runs:
        assert run.name in html
        for token in run.tokens:
            assert f"{token.probability:.3f}" in html
    [base, patched] = cost_rows(comparison)
    assert base[2] == "1.00"
    assert float(patched[1]) < float(base[1])
    assert f">{patched[1]}<" in html


def test_growing_answers_are_shown_as_they_are() -> None:
    html = cards(Progress("There is", ""), "vcd")
    assert "There is" in html
    assert "stopped" not in html
    assert "stopped" in cards(Progress("There is", "", stopped=True), "vcd")
    assert html.count('class="lmm-card"') == 2
    assert "<img" not in html


def test_text_is_never_markup(comparison) -> None:
    growing = cards(Progress(EVIL, EVIL), EVIL)
    runs = tuple(replace(run, name=EVIL, text=EVIL, tokens=(Token(EVIL, 0.5),)) for run in comparison.runs)
    done = cards(Progress(EVIL, EVIL, replace(comparison, runs=runs)), EVIL)
    for html in (growing, done, problem(EVIL)):
        assert "&lt;script&gt;" in html
        assert "<script" not in html
        assert "onerror=alert(1)>" not in html
