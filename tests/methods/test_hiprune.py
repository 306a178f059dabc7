"""HiPrune against sets and loops: anchors, their neighbours, registers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.hiprune import HiPrune, hierarchical_indices, neighbours
from tests.methods.tower_readings import FAMILIES, check, per_crop, untouched
from tests.reference import tower_reducers as naive
from tests.zoo import build


def grid_cells(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, alpha):
    # Unpadded tiles of LLaVA-NeXT lack cells; InternVL's have four tokens, which neighbours of one anchor fill.
    keep, (middle, deep) = (3, (1, 2)) if family == "internvl" else (5, (0, 1))
    middle, deep = (1, 3) if family.startswith("qwen") else (middle, deep)

    def rule(crop):
        scores = crop.received(middle), crop.received(deep)
        return untouched(naive.hiprune(*scores, crop.cells, crop.grid, keep, alpha))

    method = HiPrune(keep=keep, keep_per="crop", alpha=alpha, object_layer=middle)
    check(family, method, per_crop(rule))


@pytest.mark.parametrize("grid", [(24, 24), (5, 7), (1, 9), (9, 1)])
@pytest.mark.parametrize(("share", "alpha"), [(0.1, 0.1), (0.3, 0.5), (0.5, 1.0), (0.9, 1.0), (0.2, 0.0)])
def test_selection_equals_loops_on_random_scores(grid, share, alpha):
    row, col = grid_cells(*grid)
    size = len(row)
    shallow, deep = draw(3, size), draw(3, size, seed=1)
    keep = max(1, int(size * share))
    around = neighbours(row, col, grid)
    for exclude in (True, False):
        index = hierarchical_indices(shallow, deep, around, keep, round(keep * alpha / 5), exclude=exclude)
        for g in range(3):
            expected = naive.hiprune(
                shallow[g].tolist(), deep[g].tolist(), list(range(size)), grid, keep, alpha, exact=exclude
            )
            assert index[g][index[g] >= 0].tolist() == expected
            assert not exclude or len(expected) == keep


def test_ties_go_to_the_lower_index():
    row, col = grid_cells(4, 4)
    flat = torch.zeros(1, 16)
    index = hierarchical_indices(flat, flat, neighbours(row, col, (4, 4)), 7, 1)
    # The anchor is 0; before it and above it lies nothing, so it stands for itself.
    assert index.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert naive.hiprune([0.0] * 16, [0.0] * 16, list(range(16)), (4, 4), 7, 5 / 7) == index[0].tolist()


def test_neighbours_wrap_at_the_sides_and_are_clamped_at_the_ends():
    row, col = grid_cells(3, 4)
    around = neighbours(row, col, (3, 4))
    assert around[4].tolist() == [4, 3, 5, 0, 8], "the first of a row follows the last of the row above"
    assert around[0].tolist() == [0, 0, 1, 0, 4]
    assert around[11].tolist() == [11, 10, 11, 7, 11]
    # Columns 1 and 2 are all that unpadding left: cells that nobody shows are nobody's neighbours.
    left = (col == 1) | (col == 2)
    assert neighbours(row[left], col[left], (3, 4)).tolist()[2] == [2, 2, 3, 0, 4]
    assert neighbours(row, col, None).tolist() == [[i] for i in range(12)]


@pytest.mark.parametrize(("keep", "anchors"), [(192, 4), (128, 3), (64, 1), (25, 0), (75, 2), (125, 2)])
def test_anchors_are_rounded_half_to_even(keep, anchors):
    assert round(keep * 0.1 / 5) == anchors
    row, col = grid_cells(24, 24)
    shallow, deep = draw(1, 576), torch.zeros(1, 576)
    # Registers are the first tokens; what lies behind them are anchors and buffers.
    index = hierarchical_indices(shallow, deep, neighbours(row, col, (24, 24)), keep, anchors)
    best = shallow[0].sort(descending=True).indices[:anchors].tolist()
    assert set(best) <= set(index[0].tolist())
    assert len(set(index[0].tolist())) == keep


def test_anchors_beyond_the_budget_are_cut_off_by_rank():
    row, col = grid_cells(5, 5)
    shallow = torch.zeros(1, 25)
    shallow[0, 12], shallow[0, 6] = 2.0, 1.0
    index = hierarchical_indices(shallow, shallow, neighbours(row, col, (5, 5)), 7, 2)
    # All of 12 first, then of 6 itself; before and after it no more: 7 is above 12 and in already.
    assert set(index[0].tolist()) == {12, 11, 13, 7, 17, 6, 5}


def test_without_exclusion_sums_over_queries_lose_tokens():
    """A token that receives more than 1 (a sink) stays a register after 1 was subtracted, and counts twice."""
    row, col = grid_cells(4, 4)
    shallow = torch.zeros(1, 16)
    shallow[0, 5] = 1.0
    deep = torch.full((1, 16), 0.5)
    deep[0, 5] = 9.0
    around = neighbours(row, col, (4, 4))
    index = hierarchical_indices(shallow, deep, around, 8, 1, exclude=False)
    assert (index >= 0).sum() == 7
    assert (hierarchical_indices(shallow, deep, around, 8, 1) >= 0).sum() == 8


def counts_of(zoo, **settings) -> list[int]:
    """Tokens kept with an exact and with the released budget."""
    counts = []
    for exact in (True, False):
        method = HiPrune(**settings, exact_budget=exact)
        with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
            zoo.model(**zoo.inputs(batch=1))
            counts.append(patch.stats.layers[0].visual_kept[0])
    return counts


def test_the_released_budget_loses_what_does_not_divide_by_the_crops():
    assert counts_of(build("internvl"), keep=8) == [8, 6], "three tiles"


class SinkInTheMiddle(HiPrune):
    """HiPrune on scores as a sink makes them: one token of sixteen receives nine times the average."""

    def select(self, tokens):
        size = tokens.position.shape[1]
        scores = torch.full((1, size), (1 - 9 / size) / (size - 1) / 4)
        scores[0, size // 2] = 9 / size / 4
        return super().select(replace(tokens, probes=dict.fromkeys(tokens.probes, scores)))


@pytest.mark.parametrize(("family", "lost"), [("qwen2_vl", 1), ("llava", 0)])
def test_the_released_budget_counts_sinks_twice_where_attention_is_summed(family, lost):
    zoo = build(family)
    kept = []
    for exact in (True, False):
        method = SinkInTheMiddle(keep=8, alpha=0.5, exact_budget=exact)
        with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
            zoo.model(**zoo.inputs(batch=1))
            kept += patch.stats.layers[0].visual_kept
    assert kept == [8, 8 - lost], "means over queries are below 1, so that subtracting 1 excludes"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_equals_the_released_subtraction(family):
    def rule(crop):
        deep = crop.received(3 if family == "qwen2_5_vl" else 1)
        if family == "qwen2_5_vl":
            num_queries = sum(map(len, crop.patches))
            deep = [score * num_queries for score in deep]
        return untouched(naive.hiprune(crop.received(1), deep, crop.cells, crop.grid, 5, 0.9, exact=False))

    check(family, HiPrune(keep=5, alpha=0.9, object_layer=1, exact_budget=False), per_crop(rule))


def test_layers_are_the_published_ones():
    clip = resolve(build("llava").model)
    clip.vision_layers, clip.feature_layer = [None] * 24, 22
    assert [(p.signal, p.layer) for p in HiPrune(keep=4).probes(clip)] == [("vision_global", 8), ("vision_global", 22)]
    qwen = resolve(build("qwen2_5_vl").model)
    qwen.vision_layers, qwen.feature_layer, qwen.full_attention_vision_layers = [None] * 32, 31, (7, 15, 23, 31)
    probes = HiPrune(keep=4).probes(qwen)
    assert [(p.signal, p.layer) for p in probes] == [("vision_received", 15), ("vision_received", 31)]


def test_shares_are_rounded_to_the_nearest_token():
    method = HiPrune(keep=0.334)
    assert [method.count(share, 1296) for share in (0.334, 0.223, 0.112)] == [433, 289, 145]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"alpha": -0.1}, "alpha"), ({"alpha": 1.5}, "alpha"), ({"object_layer": 9}, "object_layer=9 is not"),
     ({"layer": 3}, "layer=3 is not")],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(settings, reason):
    with pytest.raises(lmmhooks.MethodError, match=reason):
        lmmhooks.wrap(build("llava").model, lmmhooks.method("hiprune", keep=4, **settings))


def test_windowed_layers_cannot_show_objects():
    with pytest.raises(lmmhooks.MethodError, match="windows"):
        lmmhooks.wrap(build("qwen2_5_vl").model, "hiprune(keep=4, object_layer=2)")
