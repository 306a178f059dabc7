"""Budgets: what they come to in tokens, in FLOPs and in bytes, per image and for the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lmmhooks
from lmmhooks import cost
from lmmhooks.engines.budgeting import Pool, share_out
from lmmhooks.methods.reduction.base import Cut, ReductionMethod, TokenGroup
from tests.zoo import build

SEVEN_B = cost.DecoderShape(layers=32, width=4096, kv_width=4096, ffn_width=11008, vocabulary=32064)


@dataclass(frozen=True)
class First(ReductionMethod):
    """Keeps the first tokens of every image, at the cuts it is told."""

    id: ClassVar[str] = "test-first"

    layers: tuple[int, ...] = (0,)

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(layer, self.keep) for layer in self.layers]

    def select(self, tokens: TokenGroup) -> torch.Tensor:
        return torch.arange(tokens.num_keep).expand(len(tokens.sample), -1)


def solved(budget, unit="average", layers=(0,), text=64, visual=576):
    method = First(layers=layers, budget=budget, budget_unit=unit)
    return Pool(SEVEN_B, text, (visual,) * layers[0], visual, visual).solve(method, budget, unit, None)


def test_one_cut_reproduces_the_table_of_true_budgets():
    """README-decoder section 2: a cut before layer 2 or 3 of 32, 576 tokens."""
    for layer, expected in {2: {192: 166, 128: 98, 96: 64, 64: 30}, 3: {192: 152, 128: 82, 96: 46, 64: 11}}.items():
        for average, kept in expected.items():
            assert solved(average, layers=(layer,)) == {layer: kept}


def test_several_cuts_come_as_close_as_whole_tokens_allow():
    for average, layers in ((192, (4, 12, 20)), (128, (4, 12, 20)), (64, (2, 8, 16))):
        cuts = solved(average, layers=layers)
        schedule = cost.visual_schedule(32, 576, cuts)
        assert average - 1 < cost.average_visual(schedule) <= average
        assert list(cuts.values()) == sorted(cuts.values(), reverse=True)


@pytest.mark.parametrize("unit", ["flops", "kv"])
@pytest.mark.parametrize("layers", [(0,), (2,), (4, 12, 20)])
def test_shares_of_flops_and_bytes_are_met_from_below_within_a_token(unit, layers):
    pool = Pool(SEVEN_B, 64, (576,) * layers[0], 576, 576)
    full = pool.cost({layers[0]: 576}, unit)
    cuts = solved(0.5, unit, layers)
    assert pool.cost(cuts, unit) <= 0.5 * full
    more = {layer: count + 1 for layer, count in cuts.items()}
    assert pool.cost(more, unit) > 0.5 * full


def test_the_units_mean_what_they_say():
    pool = Pool(SEVEN_B, 64, (576, 576), 576, 576)
    assert pool.cost({2: 166}, "average") == (2 * 576 + 30 * 166) / 32
    assert pool.cost({2: 166}, "kept") == 166
    assert pool.cost({2: 166}, "kv") * 2 * 4096 * 2 == cost.kv_bytes(
        SEVEN_B, cost.dense_counts(64, [576] * 2 + [166] * 30)
    )
    assert solved(0.25, "kept", (2,)) == {2: 144}
    assert solved(100, "kept", (2,)) == {2: 100}
    assert solved(1.0, "flops", (2,)) == {2: 576}


def test_a_budget_that_cannot_be_met_names_the_nearest_that_can():
    with pytest.raises(lmmhooks.PromptError, match=r"budget=30 \(average\) cannot be met.* come to 36 tokens"):
        solved(30, layers=(2,))
    with pytest.raises(lmmhooks.PromptError, match=r"budget=0.1 \(flops\) cannot be met.* come to 0\.\d{4}"):
        solved(0.1, "flops", (4,))


@given(st.integers(0, 400), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_total_is_shared_out_in_proportion(total, sizes):
    shares = share_out(total, sizes)
    assert sum(shares) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if total < sum(sizes):
        assert all(abs(share - total * size / sum(sizes)) < 1 for share, size in zip(shares, sizes, strict=True))


def kept(zoo, inputs, method) -> tuple[list[list[int]], Any]:
    """Visual tokens per layer and row."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method) as patch:
        zoo.model(**inputs)
        stats = patch.stats
    return [list(layer.visual_kept) for layer in stats.layers], stats


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_average_budget_of_a_prompt_is_what_its_statistics_say(name):
    zoo = build(name)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    layers, stats = kept(zoo, inputs, First(layers=(1,), budget=0.5))
    for row, there in enumerate(layers[0]):
        average = sum(layer[row] for layer in layers) / len(layers)
        # One cut before layer 1 of 4 lands within half a token per image and 3 of 4 layers of the budget.
        assert abs(average - 0.5 * there) <= 2 * 0.5
    assert stats.average_visual == sum(map(sum, layers)) / (2 * len(layers))


def test_flops_budget_of_a_prompt_is_what_its_statistics_say():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1, images=[3])
    _, stats = kept(zoo, inputs, First(layers=(1, 2), budget=0.7, budget_unit="flops"))
    assert 0.6 < stats.prefill_flops / stats.prefill_flops_full <= 0.7
    _, stats = kept(zoo, inputs, First(layers=(1, 2), budget=0.7, budget_unit="kv"))
    assert 0.6 < stats.kv_bytes / stats.kv_bytes_full <= 0.7


def test_tokens_are_counted_per_image_per_crop_or_in_the_whole_prompt():
    zoo = build("qwen2_vl")  # 15 and 6 tokens in the first row, 16 in the second
    inputs = zoo.inputs(batch=2, images=[2, 1])
    assert kept(zoo, inputs, First(keep=4))[0][0] == [8, 4]
    assert kept(zoo, inputs, First(keep=7, keep_per="prompt"))[0][0] == [7, 7]
    assert kept(zoo, inputs, First(budget=4))[0][0] == [8, 4]
    assert kept(zoo, inputs, First(budget=7, keep_per="prompt"))[0][0] == [7, 7]
    nextgen = build("llava_next")
    inputs = nextgen.inputs(batch=1)
    per_crop, _ = kept(nextgen, inputs, "fastervlm(keep=3, keep_per='crop')")
    by_budget, _ = kept(nextgen, inputs, "fastervlm(budget=3, keep_per='crop')")
    assert per_crop == by_budget


def test_amounts_that_make_no_sense_are_refused_at_once():
    for settings, reason in (
        ({"budget": 0}, "budget=0 is not allowed"),
        ({"budget": 1.5}, "share in"),
        ({"budget": 10, "budget_unit": "flops"}, "budget=10 is not allowed.*'flops'"),
        ({"budget": 0.5, "budget_unit": "tokens"}, "budget_unit='tokens' is not allowed"),
        ({"keep": 0.0}, "keep=0.0 is not allowed"),
        ({"keep": 4, "keep_per": "crop"}, "does not reduce crops"),
    ):
        with pytest.raises(lmmhooks.MethodError, match=reason):
            First(**settings)


def test_amounts_that_a_model_cannot_meet_are_refused_at_wrap():
    model = build("llava").model
    for method, reason in (
        (First(keep=17), "keep=17 is more than the 16 visual tokens"),
        (First(budget=17), "budget=17 is more than the 16 visual tokens"),
        (First(budget=0.2, layers=(1,)), "cannot be met by cuts from layer 1 on.*0.25"),
    ):
        with pytest.raises(lmmhooks.MethodError, match=reason):
            lmmhooks.wrap(model, method)


def test_a_budget_of_everything_changes_nothing():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, First(budget=1.0)):
            assert torch.equal(zoo.model(**inputs).logits, plain)


@pytest.mark.parametrize(
    "spec",
    ["fastv(layer={})", "dart(layer={})", "pyramiddrop(layers=(1, 2, {}))", "vscan(layer={})", "dyvte(layer={})"],
)
def test_layers_beyond_the_decoder_are_refused_and_the_one_after_its_last_cuts_nothing(spec):
    model = build("llava").model
    with pytest.raises(
        lmmhooks.MethodError, match="beyond the decoder of llava, which has layers 0 to 3; give at most 4"
    ):
        lmmhooks.wrap(model, spec.format(5))
    lmmhooks.wrap(model, spec.format(4)).remove()
