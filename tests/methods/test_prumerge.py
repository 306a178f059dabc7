"""PruMerge and PruMerge+ against loops over kept tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.prumerge import (
    PruMerge,
    absorbed_features,
    num_outliers,
    prumerge_indices,
    sample_strides,
)
from tests.methods.tower_readings import FAMILIES, check, per_crop, token_features
from tests.reference import tower_reducers as naive
from tests.zoo import build


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"plus": True},
        {"num_top": 3, "neighbours": 2},
        {"num_top": 0.25},
        {"plus": True, "num_top": 2, "stride": 3},
        {"keep": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, settings):
    resolved = resolve(build(family).model)
    last = len(resolved.vision_layers) - 1

    def rule(crop):
        top = settings.get("num_top")
        top = int(len(crop.numbers) * top) if isinstance(top, float) else top
        top = max(1, top) if isinstance(settings.get("num_top"), float) else top
        attention = crop.wide(last)
        return naive.prumerge(
            attention,
            crop.keys(last).flatten(1),
            token_features(crop, family, resolved.feature_layer),
            settings["keep"] - 1 if "keep" in settings else top,
            settings.get("plus", False),
            settings.get("stride"),
            settings.get("neighbours", 32),
        )

    extra = {"keep_per": "crop"} if "keep" in settings else {}
    check(family, PruMerge(**settings, **extra), per_crop(rule))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [16, 100, 576])
@pytest.mark.parametrize("plus", [False, True])
def test_selection_and_merging_equal_loops_on_random_tensors(size, plus):
    scores = torch.softmax(2 * draw(2, size), dim=1)
    features, keys = draw(2, size, 5, seed=1), draw(2, size, 7, seed=2)
    num_top = num_outliers(scores).clamp(min=1)
    index = prumerge_indices(scores, num_top, sample_strides(size, num_top) if plus else None)
    merged = absorbed_features(features, keys, scores, index, 32)
    for g in range(2):
        expected = naive.prumerge(scores[g].tolist(), keys[g], features[g], None, plus)
        slots, values = zip(*expected, strict=True)
        assert index[g][index[g] >= 0].tolist() == list(slots)
        # float32 sums in another order.
        torch.testing.assert_close(merged[g, : len(slots)], torch.stack(values), atol=1e-5, rtol=0)


def test_outliers_are_those_of_the_box_plot():
    scores = torch.softmax(2 * draw(20, 576), dim=1)
    for g, count in enumerate(num_outliers(scores).tolist()):
        row = scores[g].numpy()
        low, high = np.percentile(row, 25), np.percentile(row, 75)
        assert count == (row > high + 1.5 * (high - low)).sum()
        assert count == naive.outliers(scores[g].tolist())
        assert 20 < count < 100, "neither nothing nor everything stands out"


def test_the_ratio_of_576_patches_costs_no_token_but_of_729_some():
    def scores_with(count: int, size: int) -> torch.Tensor:
        return (torch.arange(size) < count).float()[None]

    assert [int(num_outliers(scores_with(c, 576))) for c in range(144)] == list(range(144))
    assert int(num_outliers(scores_with(23, 729))) == int(729 * (23 / 729)) == 22


def test_without_outliers_one_token_stays_and_the_sum_of_the_others():
    scores = torch.full((1, 16), 1 / 16)
    zoo = build("llava")
    assert int(num_outliers(scores)) == 0
    index = prumerge_indices(scores, num_outliers(scores).clamp(min=1))
    assert index[0].tolist() == [0, 1] + [-1] * 14
    merged = absorbed_features(torch.ones(1, 16, 3), torch.ones(1, 16, 3), scores, index, 4)
    torch.testing.assert_close(merged[0, 0], torch.full((3,), 1 + 4 / 16))
    torch.testing.assert_close(merged[0, 1], torch.full((3,), 15 / 16))
    assert torch.isfinite(merged).all()
    for parameter in (layer.self_attn.q_proj for layer in resolve(zoo.model).vision_layers):
        # Without queries, attention is uniform.
        torch.nn.init.zeros_(parameter.weight)
        torch.nn.init.zeros_(parameter.bias)
    for spec, most in (("prumerge", 2), ("prumerge(plus=True)", 6)):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, spec) as patch:
            assert torch.isfinite(zoo.model(**zoo.inputs(batch=1)).logits).all()
            assert 2 <= patch.stats.layers[0].visual_kept[0] <= most


def test_samples_stop_short_of_the_last_token_and_are_not_kept_twice():
    scores = torch.zeros(1, 13)
    scores[0, 4], scores[0, 3] = 2.0, 1.0
    index = prumerge_indices(scores, torch.tensor([2]), torch.tensor([4]))
    # 12 would be next; 4 is in; the sum stands where the best of the rest stood.
    assert index[0, :5].tolist() == [4, 3, 0, 8, 1]
    assert (index[0, 5:] == -1).all()


def test_something_always_leaves():
    """Samples of stride 1 and the last token among the top: the last sample makes room for the sum."""
    scores = torch.zeros(1, 5)
    scores[0, 4] = 1.0
    index = prumerge_indices(scores, torch.tensor([1]), torch.tensor([1]))
    assert index.tolist() == [[4, 0, 1, 2, 3]]
    assert [slot for slot, _ in naive.prumerge(scores[0].tolist(), draw(5, 2), draw(5, 2), 1, True, 1)] == [
        4,
        0,
        1,
        2,
        3,
    ]


def test_strides_are_those_of_the_released_code():
    assert sample_strides(576, torch.tensor([32, 40, 95, 144, 300])).tolist() == [6, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("preset", "most"), [("vtc-cls-64", 13 + 53 + 1), ("vtc-cls-128", 40 + 96 + 1), ("vtc-cls-256", 95 + 192 + 1)]
)
def test_fixed_sizes_come_to_what_was_observed(preset, most):
    method = lmmhooks.method("prumerge", preset=preset)
    scores = torch.softmax(2 * draw(50, 576), dim=1)
    index = prumerge_indices(scores, torch.full((50,), method.num_top), torch.full((50,), method.stride))
    counts = (index >= 0).sum(dim=1)
    assert counts.max() <= most
    observed = {"vtc-cls-64": 64, "vtc-cls-128": 133, "vtc-cls-256": 255}[preset]
    assert abs(float(counts.float().mean()) - observed) < 6


def test_what_is_added_is_non_negative_and_the_sum_is_of_what_leaves():
    scores = torch.softmax(draw(1, 20), dim=1)
    index = prumerge_indices(scores, torch.tensor([4]))
    # Unit vectors as features: a row of the result is the weights that made it.
    made = absorbed_features(torch.eye(20)[None], draw(1, 20, 6), scores, index, 3)[0]
    for place, token in enumerate(index[0, :4].tolist()):
        added = made[place] - torch.eye(20)[token]
        assert (added >= 0).all()
        assert added[token] == 0
        assert (added > 0).sum() == 3
    left = torch.ones(20).index_fill(0, index[0, :4], 0)
    torch.testing.assert_close(made[4], scores[0] * left)


def test_neighbours_that_are_equally_near_are_taken_in_order():
    keys = torch.zeros(1, 8, 2)
    # Token 5 is alike; 0, 1, 3 and 6 are level with each other; 4 and 7 are opposite.
    keys[0] = torch.tensor([[1.0, 1], [1, 1], [1, 0], [1, 1], [-1, 0], [1, 0], [1, 1], [-1, 0]])
    made = absorbed_features(torch.eye(8)[None], keys, torch.full((1, 8), 0.5), torch.tensor([[2, 0]]), 3)[0, 0]
    assert made.tolist() == [0.5, 0.5, 1.0, 0.0, 0.0, 0.5, 0.0, 0.0]


def test_a_number_or_a_budget_is_met_exactly():
    zoo = build("llava_next")
    inputs = zoo.inputs(batch=2)
    for spec in ("prumerge(keep=7)", "prumerge(budget=7)", "prumerge(keep=1)"):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, spec) as patch:
            zoo.model(**inputs)
            assert patch.stats.layers[0].visual_kept == ((1, 1) if spec == "prumerge(keep=1)" else (7, 7))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_top": 0}, "num_top=0"),
        ({"num_top": 1.0}, "num_top=1.0"),
        ({"num_top": 3, "keep": 5}, "num_top=3"),
        ({"plus": True, "keep": 5}, "plus=True"),
        ({"plus": True, "budget": 0.5}, "plus=True"),
        ({"stride": 3}, "stride=3"),
        ({"plus": True, "stride": 0}, "stride=0"),
        ({"neighbours": 0}, "neighbours=0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, reason):
    with pytest.raises(lmmhooks.MethodError, match=reason):
        lmmhooks.method("prumerge", **settings)
