"""EViT against a naive tower that sorts class attention in Python."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.evit import EViT, fuse_rest
from tests.methods.towers import check_answers, check_features
from tests.reference.tower import evit
from tests.zoo import build


def rule(num_kept, fuse, family):
    return partial(evit, num_kept, fuse, family != "llava_onevision")


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("fuse", [True, False])
def test_features_equal_the_naive_tower(family, fuse):
    # 16 patches: ceil(0.7 * 16) = 12, of 12 or 13 ceil(...) = 9 or 10, of 9 or 11 ceil(...) = 7 or 8.
    num_kept = {1: 12, 3: 10, 5: 8} if fuse else {1: 12, 3: 9, 5: 7}
    method = EViT(keep_rate=0.7, blocks=[1, 3, 5], fuse_token=fuse)
    counts = check_features(family, method, rule(num_kept, fuse, family))
    assert counts == [8 + 1 if fuse else 7] * 5


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_answers_equal_the_naive_tower(family):
    # 16 * (4 / 16) ** (1/3) = 10.08 and ** (2/3) = 6.35, rounded up; one of them is the fused token.
    assert EViT(keep=4).tower_layers(resolve(build(family, tower_layers=7).model)) == [1, 3, 5]
    check_answers(family, EViT(keep=4), rule({1: 10, 3: 6, 5: 3}, True, family))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_keep_is_met_exactly(fuse, num_blocks):
    for num_patches in (16, 100, 576):
        for keep in range(1 + fuse, num_patches + 1, 1 + num_patches // 50):
            method, left = EViT(keep=keep, fuse_token=fuse), num_patches
            for ordinal in range(num_blocks):
                kept = method.num_kept(left, num_patches, ordinal, num_blocks)
                assert 1 <= kept <= left
                left = left if kept == left else kept + fuse
            assert left == keep


def test_rates_round_up_as_released():
    method = EViT(keep_rate=0.7, fuse_token=False)
    assert [method.num_kept(n, 576, 0, 3) for n in (196, 138, 97, 10)] == [138, 97, 68, 7]
    assert EViT().num_kept(196, 196, 0, 3) == 138, "0.7 is the released default"


def test_blocks_are_the_published_ones_scaled_to_the_depth():
    class Tower:
        def __init__(self, depth, feature_layer):
            self.vision_layers, self.feature_layer = range(depth), feature_layer

    assert EViT().tower_layers(Tower(12, 11)) == [3, 6, 9]
    assert EViT().tower_layers(Tower(24, 22)) == [6, 12, 18]
    assert EViT().tower_layers(Tower(3, 1)) == [0, 1]
    assert EViT(blocks=[2, 4]).tower_layers(Tower(24, 22)) == (2, 4)


def test_the_fused_token_has_the_weight_nobody_else_has():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 9, generator=generator).softmax(dim=1)
    # The class token keeps 0.3 of its attention to itself.
    scores = scores * 0.7
    kept = torch.tensor([[0, 3, 8], [1, 2, 4]])
    ones, place = fuse_rest(torch.ones(2, 9, 1), scores, kept)
    expected = 1 - 0.3 - scores.gather(1, kept).sum(dim=1)
    torch.testing.assert_close(ones[:, 0, 0], expected)
    rest = [[j for j in range(9) if j not in row] for row in kept.tolist()]
    for row, (best,) in enumerate(place.tolist()):
        assert best == max(rest[row], key=lambda j: float(scores[row, j]))
    patches = torch.randn(2, 9, 5, generator=generator)
    fused, _ = fuse_rest(patches, scores, kept)
    naive = torch.stack([sum(scores[g, j] * patches[g, j] for j in rest[g]) for g in range(2)])
    torch.testing.assert_close(fused[:, 0], naive)


@pytest.mark.parametrize("settings", [{"keep_rate": 1.0}, {"keep": 1.0}, {"keep": 16}])
def test_keeping_everything_is_bit_identical(settings):
    zoo = build("llava", tower_layers=6)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, EViT(**settings)):
            assert torch.equal(zoo.model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"keep": 4, "keep_rate": 0.5}, "keep_rate=0.5"),
        ({"keep_rate": 0.0}, "keep_rate=0.0"),
        ({"keep_rate": 1.2}, "keep_rate=1.2"),
        ({"keep": 1}, "keep=1"),
        ({"blocks": []}, r"blocks=\(\)"),
        ({"blocks": [3, 1]}, r"blocks=\(3, 1\)"),
        ({"blocks": [-1]}, r"blocks=\(-1,\)"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(lmmhooks.MethodError, match=f"evit: {named} is not allowed"):
        EViT(**settings)


def test_blocks_behind_the_projector_are_refused():
    with pytest.raises(lmmhooks.MethodError, match="vision layers 0 to 1, which feed the projector"):
        lmmhooks.wrap(build("llava").model, EViT(blocks=[0, 2]))


def test_the_state_of_one_prompt_does_not_reach_the_next():
    zoo = build("llava", tower_layers=6)
    first, second = zoo.inputs(batch=1), zoo.inputs(batch=1, seed=1)
    with lmmhooks.wrap(zoo.model, EViT(keep=5)), torch.no_grad():
        expected = zoo.model(**second).logits
        zoo.model(**first)
        assert torch.equal(zoo.model(**second).logits, expected)
