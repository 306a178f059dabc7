"""Uniform grids: regular, unique, exact in number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.lattice import lattice_shape
from lmmhooks.methods.reduction.uniform_grid import UniformGrid, grid_indices, stride_indices
from tests.engines.reducers import ByNorm
from tests.zoo import build

GRIDS = [(24, 24), (16, 16), (14, 14), (27, 27), (9, 20), (3, 5), (1, 7), (30, 2)]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_every_count_is_exact_unique_and_in_order(rows, cols, center):
    for num_keep in range(1, rows * cols + 1):
        index = grid_indices(rows, cols, num_keep, center)
        assert len(index) == num_keep
        assert (index.diff() > 0).all()
        assert index.min() >= 0
        assert index.max() < rows * cols


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_all_and_one(rows, cols):
    assert grid_indices(rows, cols, rows * cols, True).tolist() == list(range(rows * cols))
    assert grid_indices(rows, cols, 1, True).tolist() == [rows // 2 * cols + cols // 2]


def test_published_grid_gives_square_lattices():
    assert [lattice_shape(24, 24, k) for k in (144, 64, 36, 128, 192)] == [(12, 12), (8, 8), (6, 6), (8, 16), (12, 16)]
    assert grid_indices(24, 24, 64, True).tolist() == [r * 24 + c for r in range(1, 24, 3) for c in range(1, 24, 3)]
    assert grid_indices(24, 24, 64, False).tolist() == [r * 24 + c for r in range(0, 24, 3) for c in range(0, 24, 3)]


def test_a_prime_number_of_tokens_shortens_the_outer_rows():
    index = grid_indices(24, 24, 29, True)
    per_row = torch.bincount(index // 24)
    counts = per_row[per_row > 0].tolist()
    assert counts == [5, 6, 6, 6, 6], "R = round(sqrt(29)) = 5, S = 6, one too many, taken from an outer row"


@pytest.mark.parametrize("num_keep", [9, 16, 64, 36])
def test_lattices_are_symmetric_where_cells_have_a_middle(num_keep):
    side = int(num_keep**0.5)
    rows = side * 3
    cells = {(int(i) // rows, int(i) % rows) for i in grid_indices(rows, rows, num_keep, True)}
    assert cells == {(row, rows - 1 - col) for row, col in cells}


def test_strides_follow_released_code():
    assert stride_indices(576, 64, False).tolist() == list(range(0, 576, 9))
    assert stride_indices(576, 50, False).tolist() == list(range(0, 550, 11)), "the first K of step n // K"
    assert stride_indices(10, 3, True).tolist() == [1, 4, 7]


def kept(zoo, inputs, spec):
    with torch.no_grad(), lmmhooks.wrap(zoo.model, spec):
        zoo.model(**inputs)
        return find_runtime(zoo.model).last.stages[0].layout.spans


def test_a_square_image_keeps_its_lattice():
    zoo = build("llava")  # 4 x 4
    (span,) = kept(zoo, zoo.inputs(batch=1), "uniform-grid(keep=4)")
    assert list(zip(span.tokens.row.tolist(), span.tokens.col.tolist(), strict=True)) == [
        (1, 1),
        (1, 3),
        (3, 1),
        (3, 3),
    ]
    (span,) = kept(zoo, zoo.inputs(batch=1), "uniform-grid(keep=4, mode='stride', offset='corner')")
    assert list(zip(span.tokens.row.tolist(), span.tokens.col.tolist(), strict=True)) == [(r, 0) for r in range(4)]


def test_unpadded_crops_are_sampled_as_the_smaller_rectangles_they_are():
    zoo = build("llava_next")
    inputs = zoo.inputs(batch=1)  # 32 x 24 pixels in 2 x 2 tiles: 8 x 6 cells are left of 8 x 8
    (full,) = kept(zoo, inputs, "reduction-identity")
    (span,) = kept(zoo, inputs, "uniform-grid(keep=4, keep_per='crop')")
    for crop in range(5):
        cells = {
            (int(r), int(c))
            for k, r, c in zip(span.tokens.crop, span.tokens.row, span.tokens.col, strict=True)
            if k == crop
        }
        present = full.tokens.crop == crop
        rows, cols = full.tokens.row[present].unique(), full.tokens.col[present].unique()
        assert len(rows) * len(cols) == int(present.sum())
        index = grid_indices(len(rows), len(cols), 4, True)
        assert cells == {(int(rows[i // len(cols)]), int(cols[i % len(cols)])) for i in index}


def test_a_grid_with_holes_is_sampled_by_stride():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0,), shares=(0.6,))):
        zoo.model(**inputs)
        (before,) = find_runtime(zoo.model).last.stages[0].layout.spans

    class Later(UniformGrid):
        id = "test-later-grid"

        def cuts(self, family):
            return [replace(cut, layer=1) for cut in super().cuts(family)]

    with torch.no_grad(), lmmhooks.wrap(zoo.model, ByNorm(layers=(0,), shares=(0.6,)), Later(keep=3)):
        zoo.model(**inputs)
        (after,) = find_runtime(zoo.model).last.stages[1].layout.spans
    assert len(before) == 9
    expected = before.tokens.subset(stride_indices(9, 3, True))
    assert torch.equal(after.tokens.row, expected.row)
    assert torch.equal(after.tokens.col, expected.col)


@pytest.mark.parametrize("settings", [{"mode": "hex"}, {"offset": "left"}, {"keep": 0.0}])
def test_values_out_of_range_are_refused_by_name(settings):
    name = next(iter(settings))
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("uniform-grid", **{"keep": 4, **settings})
