"""Pooling against loops over cells."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

import lmmhooks
from lmmhooks.methods.reduction.lattice import lattice_shape, rectangle
from lmmhooks.methods.reduction.pool import cell_centers, pool_cells, pooled_shape
from tests.methods.choosing import FAMILIES, compare, prompt_state
from tests.reference import diversity
from tests.zoo import build

GRIDS = [(24, 24), (14, 14), (27, 27), (9, 20), (3, 5), (1, 7), (30, 2)]


def grid_of(group):
    return len(set(group.cell_rows)), len(set(group.cell_cols))


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("family", [*FAMILIES, "llava_onevision"])
def test_equals_the_naive_rendering_at_prefill_and_decode(family, mode):
    def naive(group):
        grid = grid_of(group)
        return diversity.pool(group.states, grid, pooled_shape(*grid, 3), mode == "max")

    compare(family, lmmhooks.method("pool", keep=3, keep_per="crop", mode=mode), naive, by_crop=True)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_features_may_be_pooled_before_the_projector(family):
    project = build(family, attn="eager").model.model.multi_modal_projector

    def naive(group):
        grid = grid_of(group)
        cells = diversity.pool(group.probes["vision_states"], grid, pooled_shape(*grid, 4))
        return [(i, project(mean[None])[0]) for i, mean in cells]

    method = lmmhooks.method("pool", keep=4, keep_per="crop", before_projector=True)
    compare(family, method, naive, by_crop=True)


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_shapes_fit_the_budget_and_places_are_unique(rows, cols):
    for num_keep in range(1, rows * cols + 1):
        shape = pooled_shape(rows, cols, num_keep)
        assert shape[0] * shape[1] <= num_keep
        assert shape[0] <= rows
        assert shape[1] <= cols
        index = cell_centers(rows, cols, *shape)
        assert (index.diff() > 0).all()
        assert len(index) == shape[0] * shape[1]
    assert pooled_shape(rows, cols, rows * cols) == (rows, cols)
    assert cell_centers(rows, cols, rows, cols).tolist() == list(range(rows * cols))


def test_published_grids():
    assert [pooled_shape(24, 24, k) for k in (144, 64, 25, 16, 4, 1)] == [(s, s) for s in (12, 8, 5, 4, 2, 1)]
    assert pooled_shape(24, 24, 29) == lattice_shape(24, 24, 28), "29 is prime: 28 cells"


@pytest.mark.parametrize("shape", [(3, 5), (2, 2), (1, 1), (6, 9)])
def test_cells_are_those_of_adaptive_pooling(shape):
    x = torch.randn(2, 54, 7, generator=torch.Generator().manual_seed(0))
    image = x.transpose(1, 2).reshape(2, 7, 6, 9)
    for mode, function in (("avg", adaptive_avg_pool2d), ("max", adaptive_max_pool2d)):
        expected = function(image, shape).flatten(2).transpose(1, 2)
        torch.testing.assert_close(pool_cells(x, (6, 9), shape, mode), expected, atol=0, rtol=0)
    torch.testing.assert_close(
        pool_cells(torch.ones(1, 54, 2), (6, 9), shape, "avg"), torch.ones(1, shape[0] * shape[1], 2)
    )
    if 6 % shape[0] == 9 % shape[1] == 0:
        # Bins that divide evenly keep the mean of the whole; sums of 54 float32.
        torch.testing.assert_close(pool_cells(x, (6, 9), shape, "avg").mean(dim=1), x.mean(dim=1), atol=1e-6, rtol=0)


def test_a_rectangle_need_not_be_dense():
    row, col = torch.tensor([0, 0, 2, 2]), torch.tensor([1, 4, 1, 4])
    assert rectangle(row, col) == (2, 2)
    assert rectangle(row[:3], col[:3]) is None
    assert rectangle(row[[1, 0, 2, 3]], col[[1, 0, 2, 3]]) is None
    assert rectangle(torch.tensor([-1, -1]), torch.tensor([-1, -1])) is None


def test_pooled_tokens_stand_at_the_floor_of_the_mean_position():
    zoo = build("qwen2_vl")
    inputs = zoo.inputs(batch=1)
    state = prompt_state(zoo, inputs, "pool(keep=2)")
    (span,) = state.stages[0].layout.spans
    # 3 x 5 tokens as 1 x 2 cells: columns 0 to 2 and 2 to 4.
    assert list(zip(span.tokens.row.tolist(), span.tokens.col.tolist(), strict=True)) == [(1, 1), (1, 3)]


def test_what_is_no_rectangle_is_refused_when_it_is_seen(monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    monkeypatch.setattr("lmmhooks.methods.reduction.pool.rectangle", lambda row, col: None)
    with lmmhooks.wrap(zoo.model, "pool(keep=4)"), pytest.raises(lmmhooks.PromptError, match="no rectangle"):
        zoo.model(**inputs)


def test_settings_are_refused_by_name():
    with pytest.raises(lmmhooks.MethodError, match="mode"):
        lmmhooks.method("pool", keep=4, mode="sum")
    with pytest.raises(lmmhooks.MethodError, match="before_projector=True needs a projector that takes single patches"):
        lmmhooks.wrap(build("internvl").model, "pool(keep=4, before_projector=True)")
