"""Filters of maps: sinks and steps without content."""

from __future__ import annotations

import torch

from lmmhooks.geometry import CellGrid, Geometry
from lmmhooks.methods.refinement.filters import content_steps, sinks, without
from lmmhooks.methods.refinement.saliency import Saliency


def saliency(values):
    rows, columns = values.shape
    grid = CellGrid(torch.arange(values.numel()).reshape(rows, columns), (0.0, 0.0, 40.0, 30.0), "image")
    return Saliency(values.flatten(), Geometry((40, 30), values.numel(), (grid,)))


def test_steps_of_content_words_are_kept():
    pieces = ["The", " cir", "cle", " is", " red", "."]
    assert content_steps(pieces).tolist() == [False, True, True, False, True, False]
    assert content_steps(["the", " of"]).all()
    assert content_steps([]).tolist() == []


def test_a_sink_stands_out_in_half_of_the_heads():
    rows = torch.full((2, 1, 4, 6), 0.01)
    rows[:, 0, :2, 1] = 0.6
    rows[:, 0, :1, 4] = 0.6
    # Five even shares of 50 keys are 0.1.
    assert sinks(rows, 50).tolist() == [False, True, False, False, False, False]
    assert not sinks(rows, 5).any(), "0.6 is less than five shares of five or six keys"
    assert sinks(rows, 50, share=0.25).nonzero()[:, 0].tolist() == [1, 4]


def test_dropped_sinks_are_zero_and_the_sum_stays():
    found = saliency(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))
    none = torch.zeros(12, dtype=torch.bool)
    for how in ("drop", "median"):
        torch.testing.assert_close(without(found, none, how).values, found.values)
    some = none.clone()
    some[[2, 7]] = True
    rest = without(found, some, "drop").values
    assert rest[some].eq(0).all()
    torch.testing.assert_close(rest.sum(), found.values.sum())
    torch.testing.assert_close(
        rest[~some] / found.values[~some], torch.full((10,), float(rest[0] / found.values[0])).double()
    )
    assert without(found, ~none, "drop").values.eq(0).all()


def test_sinks_become_the_median_of_the_cells_around_them():
    values = torch.arange(12.0).reshape(3, 4)
    some = torch.zeros(12, dtype=torch.bool)
    some[[5, 6]] = True
    rest = without(saliency(values), some, "median").values
    # Around cell 5 but for 6: 0 1 2 4 8 9 10; around cell 6 but for 5: 1 2 3 7 9 10 11.
    assert rest[5] == 4
    assert rest[6] == 7
    assert rest[~some].tolist() == values.flatten()[~some].tolist()
