"""LOOK-M against explicit attention, one head and one entry at a time."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.caching import best_entries
from lmmhooks.methods.reduction.caching import Pairs
from lmmhooks.methods.reduction.look_m import LookM, merge_pairs
from tests.engines.pressers import STEPS, TOLERANCE, generate, visual_of
from tests.reference.caching import look_m, merged, step_logits
from tests.zoo import build

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")


@pytest.mark.parametrize("text_prior", [True, False])
@pytest.mark.parametrize("merge", ["pivot", "average", "weighted", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_while_decoding(family, merge, text_prior):
    if family not in ("llava", "qwen3_vl") and (merge, text_prior) not in (("pivot", True), ("weighted", False)):
        return  # every merge on two families is enough
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    settings = {"hh_ratio": 0.6, "recent_ratio": 0.1, "merge": merge, "text_prior": text_prior}
    with lmmhooks.wrap(zoo.model, LookM(**settings)):
        answer, logits, _ = generate(zoo, inputs)
    for row in range(2):
        one = zoo.row(inputs, row)
        expected = step_logits(zoo.model, one, look_m(visual_of(one), **settings), answer[row])
        torch.testing.assert_close(logits[row], expected, atol=TOLERANCE, rtol=0)


def test_it_changes_what_follows_the_prompt_and_nothing_of_the_prompt():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, LookM()):
            assert torch.equal(zoo.model(**inputs).logits, plain)
    _, plain_steps, _ = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, LookM()):
        _, steps, _ = generate(zoo, inputs)
    assert torch.equal(steps[:, 0], plain_steps[:, 0])
    assert (steps[:, 1] - plain_steps[:, 1]).abs().amax() > 1e-2


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        # 24 tokens: 3 + 16 visual + 5; int(2.4) = 2 of each, and 6 text tokens stand before the window.
        ({}, 6 + 2),
        ({"text_prior": False}, 2 + 2),
        ({"hh_ratio": 0.5}, 12 + 2),
        ({"hh_ratio": 0.5, "recent_ratio": 0.3}, 12 + 7),
        # The window reaches into the image: 3 text tokens stand before it.
        ({"hh_ratio": 0.05, "recent_ratio": 0.3}, 3 + 7),
        ({"hh_ratio": 0.6, "recent_ratio": 0.5}, 24),
    ],
)
def test_sizes_follow_the_formula_in_every_layer_and_head(settings, kept):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, LookM(**settings)) as patch:
        _, _, lengths = generate(zoo, zoo.inputs(batch=1))
        stats = patch.stats
    # The last token was never fed.
    assert lengths == [kept + STEPS - 1] * 4
    assert stats.kv_bytes == 4 * kept * 2 * 2 * 16 * 4
    assert stats.kv_bytes_full == 4 * 24 * 2 * 2 * 16 * 4


def test_all_text_stays():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=1)
    caches = []
    for method in ("reduction-identity", LookM(merge="none")):
        with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
            caches.append(zoo.model(**inputs).past_key_values)
    text = [j for j, seen in enumerate(visual_of(inputs)) if not seen]
    for full, pressed in zip(caches[0].layers, caches[1].layers, strict=True):
        assert pressed.keys.shape[2] == len(text)
        assert torch.equal(pressed.keys, full.keys[:, :, text])
        assert torch.equal(pressed.values, full.values[:, :, text])


@pytest.mark.parametrize("settings", [{"hh_ratio": 1.0}, {"recent_ratio": 1.0}, {"hh_ratio": 0.6, "recent_ratio": 0.6}])
def test_keeping_everything_is_bit_identical(settings):
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=2)
    plain, plain_logits, lengths = generate(zoo, inputs)
    with lmmhooks.wrap(zoo.model, LookM(**settings)):
        answer, logits, kept = generate(zoo, inputs)
    assert torch.equal(answer, plain)
    assert torch.equal(logits, plain_logits)
    assert kept == lengths


def random_pairs(heads: int, num: int, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, heads, num, 8, generator=generator)
    return Pairs(keys, values, torch.ones(2, num, dtype=torch.bool))


@pytest.mark.parametrize("merge", ["pivot", "average", "weighted"])
def test_merging_equals_loops_over_pairs(merge):
    kept, evicted = random_pairs(3, 5, 0), random_pairs(3, 9, 1)
    keys, values = merge_pairs(kept, evicted, merge)
    for row in range(2):
        all_keys, all_values = (
            torch.cat([getattr(kept, name)[row], getattr(evicted, name)[row]], dim=1) for name in ("keys", "values")
        )
        expected = merged([list(range(5))] * 3, all_keys, all_values, merge)
        for head, pairs in enumerate(expected):
            torch.testing.assert_close(keys[row, head], torch.stack([key for key, _ in pairs]))
            torch.testing.assert_close(values[row, head], torch.stack([value for _, value in pairs]))


@pytest.mark.parametrize("merge", ["pivot", "average", "weighted"])
def test_fillers_neither_give_nor_take(merge):
    kept, evicted = random_pairs(2, 6, 2), random_pairs(2, 7, 3)
    few_kept = Pairs(kept.keys, kept.values, torch.arange(6).expand(2, -1) >= 2)
    few_evicted = Pairs(evicted.keys, evicted.values, torch.arange(7).expand(2, -1) >= 3)
    keys, values = merge_pairs(few_kept, few_evicted, merge)
    without = [
        Pairs(pairs.keys[:, :, start:], pairs.values[:, :, start:], pairs.real[:, start:])
        for pairs, start in ((kept, 2), (evicted, 3))
    ]
    expected = merge_pairs(*without, merge)
    torch.testing.assert_close(keys[:, :, 2:], expected[0])
    torch.testing.assert_close(values[:, :, 2:], expected[1])


def test_ties_go_to_the_earlier_entry():
    scores = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0]]])
    assert best_entries(scores, [2]).tolist() == [[[False, True, True, False, False]]]


@pytest.mark.parametrize(
    "settings", [{"hh_ratio": 0.0}, {"hh_ratio": 1.2}, {"recent_ratio": -0.1}, {"merge": "sum"}], ids=str
)
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("look-m", **settings)
