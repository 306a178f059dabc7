"""Maps against boxes and against what the answer depends on."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.geometry import CellGrid, Geometry
from lmmhooks.inspect.localisation import (
    Faithfulness,
    area_under,
    attention_ratio,
    localise,
    mass_inside,
    points_inside,
    top_region_iou,
)

#: 40 x 20 pixels in 2 x 4 cells of 10 pixels, and a token without a cell.
GEOMETRY = Geometry((40, 20), 9, (CellGrid(torch.arange(8).view(2, 4), (0.0, 0.0, 40.0, 20.0), "image"),))
SECOND = (10.0, 0.0, 20.0, 10.0)


def one_hot(token):
    return torch.nn.functional.one_hot(torch.tensor(token), 9).double()


def test_a_map_of_one_cell_lies_in_it():
    found = localise(GEOMETRY, one_hot(1), SECOND)
    assert found.to_dict() == {"pointing": True, "mass": 1.0, "area": 0.125, "ratio": found.ratio, "iou": 1.0}
    # A window of 10 x 10 pixels at all 31 x 11 places: along a row, overlaps of 1 to 10 to 1; downwards 10 to 0.
    mean = (sum(10 - abs(x - 10) for x in range(1, 20)) * sum(range(11))) / (31 * 11) / 100
    assert found.ratio == pytest.approx(1 / mean)
    beside = localise(GEOMETRY, one_hot(6), SECOND)
    assert (beside.pointing, beside.mass, beside.ratio, beside.iou) == (False, 0.0, 0.0, 0.0)


def test_an_even_map_points_nowhere():
    even = torch.ones(9)
    assert not points_inside(GEOMETRY, even, SECOND)
    assert mass_inside(GEOMETRY, even, SECOND) == pytest.approx(0.125)
    assert attention_ratio(GEOMETRY, even, SECOND) == pytest.approx(1.0)
    assert top_region_iou(GEOMETRY, even, SECOND) == pytest.approx(0.125)


def test_a_map_of_no_mass_says_nothing():
    nothing = torch.zeros(9)
    assert mass_inside(GEOMETRY, nothing, SECOND) == 0.0
    assert attention_ratio(GEOMETRY, nothing, SECOND) == 1.0
    assert not points_inside(GEOMETRY, torch.full((9,), torch.nan), SECOND)


def test_cells_that_reach_into_a_box_count_by_area():
    assert mass_inside(GEOMETRY, one_hot(1), (5.0, 0.0, 15.0, 10.0)) == pytest.approx(0.5)
    # Nothing of a newline token lies anywhere.
    assert mass_inside(GEOMETRY, one_hot(1) + 9 * one_hot(8), SECOND) == pytest.approx(1.0)


def test_boxes_outside_the_image_are_refused():
    for box in ((0.0, 0.0, 50.0, 10.0), (5.0, 5.0, 5.0, 9.0)):
        with pytest.raises(lmmhooks.PromptError, match="must lie in the image of 40 x 20"):
            attention_ratio(GEOMETRY, one_hot(0), box)
    with pytest.raises(lmmhooks.PromptError, match="share is 0"):
        top_region_iou(GEOMETRY, one_hot(0), SECOND, 0)


def test_boxes_thinner_than_a_pixel_hold_one():
    found = localise(GEOMETRY, one_hot(7), (39.8, 19.8, 40.0, 20.0))
    assert found.area == pytest.approx(1 / 800)
    assert found.pointing is False, "the centre of the cell lies elsewhere"


def test_areas_under_curves():
    assert area_under((0.0, 0.5, 1.0), (2.0, 0.0, 0.0)) == pytest.approx(0.5)
    curves = Faithfulness((0.0, 0.5, 1.0), (0.0, -4.0, -4.0), (-4.0, 0.0, 0.0), ((0.0, -2, -4.0),), ((-4.0, -2, 0.0),))
    assert curves.better_than_random
    assert curves.to_dict()["random_deletion_auc"] == (-2.0,)
    worse = Faithfulness((0.0, 0.5, 1.0), (0.0, -1.0, -4.0), (-4.0, 0.0, 0.0), ((0.0, -2, -4.0),), ((-4.0, -2, 0.0),))
    assert not worse.better_than_random
