"""VisPruner against pairs compared one by one."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.vispruner import VisPruner, distinct_indices
from tests.methods.tower_readings import FAMILIES, check, per_crop, token_features, untouched
from tests.reference import tower_reducers as naive
from tests.zoo import build


@pytest.mark.parametrize(("ratio", "step"), [(0.5, 2), (0.0, 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, ratio, step):
    keep = 2 if family == "internvl" else 5
    layer = resolve(build(family).model).feature_layer

    def rule(crop):
        features = token_features(crop, family, layer)
        return untouched(naive.vispruner(crop.salient(layer), features, keep, ratio, step))

    method = VisPruner(keep=keep, keep_per="crop", important_ratio=ratio, step=step)
    check(family, method, per_crop(rule))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [16, 25, 40])
@pytest.mark.parametrize("keep", [1, 2, 7, 15])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_thinning_out_equals_loops_for_even_and_odd_numbers(size, keep, step):
    features, order = draw(3, size, 6), torch.stack([torch.randperm(size) for _ in range(3)])
    index = distinct_indices(features, order, keep, step)
    assert index.shape == (3, keep)
    for g in range(3):
        attention = (-order[g].argsort()).tolist()
        expected = naive.vispruner(attention, features[g], keep, 0.0, step)
        assert sorted(index[g].tolist()) == expected


def test_the_numbers_of_the_paper_leave_in_eights():
    """576 tokens, 64 kept: 544 thinned out to 32, in 64 passes of 8, as the released code counts them."""
    features = draw(1, 576, 8)
    left = torch.arange(32, 576)[None]
    index = distinct_indices(features, left, 32)
    assert index.shape == (1, 32)
    once = distinct_indices(features, left, 536)
    even, odd = left[0, ::2].tolist(), left[0, 1::2].tolist()
    assert once[0, -272:].tolist() == odd, "odd places follow, in their order"
    gone = set(even) - set(once[0].tolist())
    closest = {i: max(naive.cosine(features[0, i], features[0, j]) for j in odd) for i in even}
    assert gone == set(sorted(even, key=lambda i: -closest[i])[:8])


def test_equal_likeness_goes_by_place():
    features = torch.ones(1, 8, 4)
    # All alike: the first even places leave, 0 and 2, then 4 of (4, 6, 1, 3, 5, 7).
    assert distinct_indices(features, torch.arange(8)[None], 5, 2).tolist() == [[1, 5, 6, 3, 7]]
    assert naive.vispruner([1.0] * 8, features[0], 5, 0.0, 2) == [1, 3, 5, 6, 7]


def test_groups_do_not_share_an_order():
    features, order = draw(2, 20, 6), torch.stack([torch.arange(20), torch.arange(20).flip(0)])
    together = distinct_indices(features, order, 6)
    alone = [distinct_indices(features[g : g + 1], order[g : g + 1], 6) for g in range(2)]
    assert torch.equal(together, torch.cat(alone))


def kept(zoo, inputs, spec):
    with torch.no_grad(), lmmhooks.wrap(zoo.model, spec):
        zoo.model(**inputs)
        return find_runtime(zoo.model).last.stages[0].index


def test_importance_alone_is_fastervlm_and_important_tokens_always_stay():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    assert torch.equal(
        kept(zoo, inputs, "vispruner(keep=6, important_ratio=1.0)"), kept(zoo, inputs, "fastervlm(keep=6)")
    )
    mixed, important = kept(zoo, inputs, "vispruner(keep=6)"), kept(zoo, inputs, "fastervlm(keep=3)")
    for row in range(2):
        assert set(important[row].tolist()) <= {*mixed[row].tolist(), -1}


@pytest.mark.parametrize("settings", [{"important_ratio": 1.1}, {"important_ratio": -0.5}, {"step": 0}, {"step": 2.5}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("vispruner", keep=4, **settings)
