"""ToMe against a naive tower that merges tokens in a Python list."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import lmmhooks
from lmmhooks.methods.reduction.tome import ToMe, constant_schedule, even_schedule, match_tokens, merge_tokens
from tests.methods.towers import check_answers, check_features, tower_features
from tests.reference.tower import tome
from tests.zoo import build

DEPTH = 7


def rule(schedule, family):
    return partial(tome, schedule, family != "llava_onevision")


def layers_of(family):
    return DEPTH if family == "llava_onevision" else DEPTH - 1


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("prop_attn", [True, False])
def test_merged_features_equal_the_naive_tower(family, prop_attn):
    schedule = [2, 2, 2, 1, 1, 1, 1][: layers_of(family)]
    method = ToMe(r=schedule, prop_attn=prop_attn)
    counts = check_features(family, method, rule(schedule, family), depth=DEPTH, weigh=prop_attn)
    assert counts == [16 - sum(schedule)] * 5


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_answers_equal_the_naive_tower(family):
    schedule = even_schedule(16, 10, layers_of(family))
    check_answers(family, ToMe(keep=6), rule(schedule, family), depth=DEPTH, weigh=True)


@pytest.mark.parametrize("keep", [1, 3, 7, 15, 0.4])
def test_keep_is_met_exactly(keep):
    zoo = build("llava", tower_layers=DEPTH)
    with lmmhooks.wrap(zoo.model, ToMe(keep=keep)) as patch, torch.no_grad():
        zoo.model(**zoo.inputs(batch=2, images=[2, 1]))
        expected = keep if isinstance(keep, int) else 6
        assert patch.stats.layers[0].visual_kept == (2 * expected, expected)


def test_a_layer_merges_at_most_half():
    zoo = build("llava")
    with pytest.raises(lmmhooks.MethodError, match=r"keep=3 means 3 of 16 .* leave 4; give at least that"):
        lmmhooks.wrap(zoo.model, ToMe(keep=3))
    with lmmhooks.wrap(zoo.model, ToMe(keep=4)) as patch, torch.no_grad():
        zoo.model(**zoo.inputs())
        assert patch.stats.layers[0].visual_kept == (4,)
    with lmmhooks.wrap(zoo.model, ToMe(r=100)) as patch, torch.no_grad():
        zoo.model(**zoo.inputs())
        assert patch.stats.layers[0].visual_kept == (4,), "r is cut to half, as released"


@pytest.mark.parametrize("num_layers", range(1, 8))
@pytest.mark.parametrize("num_patches", [5, 16, 29, 576])
def test_even_schedules_are_exact_and_feasible(num_patches, num_layers):
    for num_merged in range(0, num_patches, 1 + num_patches // 40):
        schedule = even_schedule(num_patches, num_merged, num_layers)
        left, most = num_patches, num_patches
        for _ in range(num_layers):
            most -= most // 2
        if schedule is None:
            assert num_merged > num_patches - most
            continue
        assert sum(schedule) == num_merged
        for r in schedule:
            assert 0 <= r <= left // 2
            left -= r
        assert schedule == sorted(schedule, reverse=True)
        even = -(-num_merged // num_layers)
        feasible = all(r <= (num_patches - even * i) // 2 for i, r in enumerate([even] * num_layers))
        assert not feasible or max(schedule) - min(schedule) <= 1


def test_published_shapes():
    assert even_schedule(576, 576 - 64, 23) == [23] * 6 + [22] * 17
    assert constant_schedule(23, 0.0, 24) == [23] * 24
    assert constant_schedule(8, -1.0, 5) == [16, 12, 8, 4, 0]
    assert constant_schedule(8, 1.0, 5) == [0, 4, 8, 12, 16]
    assert constant_schedule(7, 0.5, 4) == [3, 5, 8, 11], "ends are whole, what lies between is rounded down"
    assert ToMe(r=(8, -1.0)).schedule(576, 5) == [16, 12, 8, 4, 0]
    assert ToMe(r=[8, 3]).schedule(576, 4) == [8, 3, 0, 0]
    assert ToMe(r=[8, 1.0]) == ToMe(r=(8, 1.0)), "JSON knows no tuples"


@pytest.mark.parametrize("has_cls", [True, False])
def test_merging_preserves_sizes_and_sums(has_cls):
    generator = torch.Generator().manual_seed(0)
    states, metric = (torch.randn(3, 21, width, generator=generator) for width in (6, 4))
    size = torch.randint(1, 5, (3, 21), generator=generator).float()
    size[:, 0] = 1
    origin = torch.stack([torch.randperm(50, generator=generator)[:21].sort().values for _ in range(3)])
    source, partner, rest = match_tokens(metric, 6, has_cls)
    merged, sizes, first = merge_tokens(states, size, origin, source, partner, rest)
    assert merged.shape == (3, 15, 6)
    assert torch.equal(sizes.sum(dim=1), size.sum(dim=1))
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), (states * size[..., None]).sum(1))
    assert all(len(row.unique()) == 15 for row in first)
    if has_cls:
        assert torch.equal(merged[:, 0], states[:, 0])
        assert torch.equal(sizes[:, 0], size[:, 0])
        assert (source > 0).all()
        assert (rest.diff(dim=1) > 0).all()
    # What neither gave nor took is untouched, to the last bit.
    assert torch.equal(merged[:, : rest.shape[1]], states[:, ::2].gather(1, rest[..., None].expand(-1, -1, 6)))


def test_matching_finds_the_most_similar_pair():
    metric = torch.eye(6)[None].clone()
    metric[0, 4] = metric[0, 1] * 3 + 0.1 * metric[0, 4]
    source, partner, rest = match_tokens(metric, 1, True)
    assert (source.tolist(), partner.tolist(), rest.tolist()) == ([[2]], [[0]], [[0, 1]])


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": [0, 0]}, {"r": (0, 1.0)}, {"keep": 1.0}])
def test_nothing_merged_is_nothing_attached(settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, ToMe(**settings)):
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_keeping_as_many_as_there_are_is_bit_identical():
    zoo = build("llava", tower_layers=DEPTH)
    inputs = zoo.inputs(batch=2)
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        plain, features = zoo.model(**inputs).logits, tower_features(zoo, pixels)
        with lmmhooks.wrap(zoo.model, ToMe(keep=16)):
            assert torch.equal(tower_features(zoo, pixels), features)
            assert torch.equal(zoo.model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "r=None"),
        ({"keep": 4, "r": 2}, "r=2"),
        ({"r": -1}, "r=-1"),
        ({"r": 1.5}, "r=1.5"),
        ({"r": (2, 1.5)}, r"r=\(2, 1.5\)"),
        ({"r": []}, r"r=\(\)"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(lmmhooks.MethodError, match=f"tome: {named} is not allowed"):
        ToMe(**settings)


def test_more_numbers_than_layers_are_refused():
    with pytest.raises(lmmhooks.MethodError, match="at most 2 numbers"):
        lmmhooks.wrap(build("llava").model, ToMe(r=[1, 1, 1]))


def test_the_state_of_one_prompt_does_not_reach_the_next():
    zoo = build("llava", tower_layers=DEPTH)
    first, second = zoo.inputs(batch=1), zoo.inputs(batch=1, seed=1)
    with lmmhooks.wrap(zoo.model, ToMe(keep=5)), torch.no_grad():
        expected = zoo.model(**second).logits
        zoo.model(**first)
        assert torch.equal(zoo.model(**second).logits, expected)
