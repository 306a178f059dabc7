"""ATS against a naive tower that samples in Python."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import lmmhooks
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.ats import ATS, sample_inverse, stabilised_attention
from tests.methods.towers import check_answers, check_features
from tests.reference.tower import ats
from tests.zoo import build


def rule(method, family, blocks):
    has_cls = family != "llava_onevision"
    return partial(ats, blocks, method.levels(16 + has_cls, has_cls), method.min_tokens, has_cls)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("settings", [{}, {"num_samples": 9}, {"num_samples": 0.4, "min_tokens": 5}], ids=str)
def test_features_equal_the_naive_tower(family, settings):
    method = ATS(blocks=[1, 2, 4], **settings)
    counts = check_features(family, method, rule(method, family, [1, 2, 4]))
    assert max(counts) < 16
    assert min(counts) >= method.min_tokens
    if not method.min_tokens > 1:
        assert len(set(counts)) > 1, "the image is meant to decide"


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_answers_equal_the_naive_tower(family):
    method = ATS(num_samples=12)
    layers = list(method.tower_layers(resolve(build(family, tower_layers=7).model)))
    assert layers[0] == 1
    check_answers(family, method, rule(method, family, layers))


def test_sampling_keeps_the_best_and_at_most_one_patch_per_level():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, 40, generator=generator).exp()
    for num_levels in (2, 5, 20, 39, 40, 80):
        kept = sample_inverse(scores, num_levels)
        assert (kept.sum(dim=1) <= num_levels).all()
        assert kept.gather(1, scores.argmax(dim=1, keepdim=True)).all()


def test_even_scores_lose_only_what_ranks_last():
    """The distribution begins at 0, which no level meets: the released formula never keeps the first of the ranking."""
    kept = sample_inverse(torch.ones(1, 12), 12)
    assert kept.tolist() == [[False] + [True] * 11]


def test_a_floor_adds_the_best_of_the_others():
    scores = torch.tensor([[1000.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    # The lowest level meets the patch ranked last but one, the highest the best.
    assert sample_inverse(scores, 2)[0].nonzero().flatten().tolist() == [0, 2]
    assert sample_inverse(scores, 2, min_tokens=4)[0].nonzero().flatten().tolist() == [0, 2, 4, 5]
    assert sample_inverse(scores, 2, min_tokens=9).all()


def test_padding_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(8, 15, generator=generator)
    real = torch.arange(20) < 15
    padded = torch.nn.functional.pad(scores, (0, 5))
    for num_levels, floor in ((6, 1), (15, 1), (6, 12)):
        plain = sample_inverse(scores, num_levels, floor)
        kept = sample_inverse(padded, num_levels, floor, real.expand(8, -1))
        assert torch.equal(kept[:, :15], plain)
        assert not kept[:, 15:].any()
    logits = torch.randn(8, 2, 15, generator=generator)
    masked = torch.nn.functional.pad(logits, (0, 5), value=torch.finfo(torch.float32).min)
    attention = stabilised_attention(masked, real.expand(8, -1))
    torch.testing.assert_close(attention[..., :15], stabilised_attention(logits, None))


def test_a_lone_patch_stays():
    assert sample_inverse(torch.tensor([[0.3]]), 5).tolist() == [[True]]


def test_attention_is_a_softmax_but_for_the_stabiliser():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(stabilised_attention(logits, None), logits.softmax(dim=-1), atol=2e-6, rtol=0)


def test_blocks_are_the_released_ones_scaled_to_the_depth():
    class Tower:
        def __init__(self, depth, feature_layer):
            self.vision_layers, self.feature_layer = range(depth), feature_layer

    assert list(ATS().tower_layers(Tower(12, 11))) == list(range(3, 12))
    assert list(ATS().tower_layers(Tower(24, 22))) == list(range(6, 23))
    assert ATS().levels(577, True) == 576, "one level per patch, as released"
    assert ATS(num_samples=0.5).levels(577, True) == 287
    assert ATS(num_samples=64).levels(577, True) == 63


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_samples": 2}, "num_samples=2"),
        ({"num_samples": 1.5}, "num_samples=1.5"),
        ({"num_samples": 0.0}, "num_samples=0.0"),
        ({"min_tokens": 0}, "min_tokens=0"),
        ({"blocks": [4, 4]}, r"blocks=\(4, 4\)"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(lmmhooks.MethodError, match=f"ats: {named} is not allowed"):
        ATS(**settings)


def test_a_count_is_not_a_setting():
    with pytest.raises(lmmhooks.MethodError, match="no hyper-parameter 'keep'"):
        lmmhooks.method("ats", keep=4)


def test_the_state_of_one_prompt_does_not_reach_the_next():
    zoo = build("llava", tower_layers=6)
    first, second = zoo.inputs(batch=1), zoo.inputs(batch=1, seed=1)
    with lmmhooks.wrap(zoo.model, ATS()), torch.no_grad():
        expected = zoo.model(**second).logits
        zoo.model(**first)
        assert torch.equal(zoo.model(**second).logits, expected)
