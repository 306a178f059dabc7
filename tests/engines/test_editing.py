"""Factors on keys through the model's own backend against explicit weights, and weights that methods ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.methods.attention.base import AttentionMethod
from tests.reference.attention import full_logits
from tests.zoo import IMAGE, build

# float32, four layers, sums in another order; largest difference seen is 2e-6.
TOLERANCE = 1e-5
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"]


@dataclass(frozen=True)
class AfterImage(AttentionMethod):
    """Another factor for every segment, position and layer, so that no mix-up goes unseen."""

    id: ClassVar[str] = "test-factors-after-image"

    def scale_keys(self, context):
        layout = context.layout
        slope = 1.0 + 0.1 * context.layer + 0.01 * layout.valid.cumsum(dim=1)
        return torch.where(layout.visual, 1.4 * slope, torch.where(layout.system, 0.6 * slope, 1.0))


@dataclass(frozen=True)
class AllRows(AfterImage):
    id: ClassVar[str] = "test-factors-all-rows"
    rows: ClassVar[str] = "all"


@dataclass(frozen=True)
class PerHead(AfterImage):
    """Another factor for every head too."""

    id: ClassVar[str] = "test-factors-per-head"

    def scale_keys(self, context):
        slope = torch.linspace(0.8, 1.2, context.family.num_heads)
        return super().scale_keys(context)[:, None] * slope[:, None]


@dataclass(frozen=True)
class Unchanged(AfterImage):
    id: ClassVar[str] = "test-factors-of-none"

    def scale_keys(self, context):
        return None


@pytest.fixture
def fused(monkeypatch):
    """Calls that were answered by the fused form; it is used from the first row on unless a test says otherwise."""
    answered = []
    original = editing.Edit._scaled_keys

    def counted(self, method, plan):
        result = original(self, method, plan)
        if result is not None:
            answered.append(self.layer)
        return result

    monkeypatch.setattr(editing.Edit, "_scaled_keys", counted)
    monkeypatch.setattr(editing, "FUSED_ROWS", 1)
    return answered


def both_ways(zoo, method, inputs, monkeypatch, fused, steps=3, **kwargs):
    """Logits ``[B, steps, vocabulary]`` of the fused and of the explicit form."""
    settings = {"max_new_tokens": steps, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with lmmhooks.wrap(zoo.model, method) as patch:
        quick = zoo.model.generate(**inputs, **settings, **kwargs)
        moved = dict(patch._runtime.last_state.moved)
        assert len(fused) == 4, "one call per layer, at prefill only"
        monkeypatch.setattr(editing, "FUSED_ROWS", 10**6)
        slow = zoo.model.generate(**inputs, **settings, **kwargs)
        assert len(fused) == 4
    assert all(float(mass) > 0 for mass in moved.values())
    plain = full_logits(zoo.model, inputs)[:, -1]
    assert (slow.logits[0] - plain).abs().max() > 1e-2, "factors that change nothing prove nothing"
    return torch.stack(quick.logits, dim=1), torch.stack(slow.logits, dim=1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_scaled_keys_equal_scaled_logits(family, batch, attn, monkeypatch, fused):
    zoo = build(family, attn=attn)
    inputs = zoo.inputs(batch=batch)
    assert inputs["attention_mask"].all() == (batch == 1)
    torch.testing.assert_close(*both_ways(zoo, AfterImage(), inputs, monkeypatch, fused), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [[2, 1], [0, 2]], ids=["two images", "a row without image"])
def test_rows_that_differ_in_images(images, attn, monkeypatch, fused):
    zoo = build("llava", attn=attn)
    inputs = zoo.inputs(batch=2, images=images)
    torch.testing.assert_close(*both_ways(zoo, AfterImage(), inputs, monkeypatch, fused), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
def test_all_rows_at_once(batch, attn, monkeypatch, fused):
    """Without padding the plan covers the whole call, and nothing is left to the unedited form."""
    zoo = build("llava", attn=attn)
    inputs = zoo.inputs(batch=batch)
    torch.testing.assert_close(*both_ways(zoo, AllRows(), inputs, monkeypatch, fused), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_cache_of_fixed_length(attn, monkeypatch, fused):
    zoo = build("llava", attn=attn)
    outputs = both_ways(
        zoo, AfterImage(), zoo.inputs(batch=2), monkeypatch, fused, steps=4, cache_implementation="static"
    )
    torch.testing.assert_close(*outputs, atol=TOLERANCE, rtol=0)


def test_padding_on_the_right(monkeypatch, fused):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, padding="right")
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), lmmhooks.wrap(zoo.model, AfterImage()):
        quick = zoo.model(**inputs).logits[real]
        assert fused == [0, 1, 2, 3]
        monkeypatch.setattr(editing, "FUSED_ROWS", 10**6)
        slow = zoo.model(**inputs).logits[real]
    torch.testing.assert_close(quick, slow, atol=TOLERANCE, rtol=0)


def test_rows_that_are_not_edited_come_from_the_unedited_form(fused):
    zoo = build("llava", layers=1)
    inputs = zoo.inputs(batch=1)
    ids = inputs["input_ids"][0].tolist()
    first_edited = len(ids) - ids[::-1].index(IMAGE)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, AfterImage()):
            edited = zoo.model(**inputs).logits
    assert fused == [0]
    assert torch.equal(edited[:, :first_edited], plain[:, :first_edited])
    assert (edited[:, first_edited:] - plain[:, first_edited:]).abs().amax(dim=-1).min() > 1e-3


def test_the_cache_holds_the_keys_as_they_were(fused):
    zoo = build("llava", layers=1)
    inputs = zoo.inputs(batch=2)
    plain, edited = DynamicCache(), DynamicCache()
    with torch.no_grad():
        zoo.model(**inputs, past_key_values=plain)
        with lmmhooks.wrap(zoo.model, AfterImage()):
            zoo.model(**inputs, past_key_values=edited)
    assert fused == [0]
    assert torch.equal(edited.layers[0].keys, plain.layers[0].keys)
    assert torch.equal(edited.layers[0].values, plain.layers[0].values)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_factors_per_head_where_every_head_has_its_keys(attn, monkeypatch, fused):
    zoo = build("llava", attn=attn, num_key_value_heads=4)
    outputs = both_ways(zoo, PerHead(), zoo.inputs(batch=2), monkeypatch, fused)
    torch.testing.assert_close(*outputs, atol=TOLERANCE, rtol=0)


def test_factors_per_head_take_explicit_rows_where_heads_share_keys(fused):
    zoo = build("llava")
    with torch.no_grad(), lmmhooks.wrap(zoo.model, PerHead()):
        zoo.model(**zoo.inputs(batch=2))
    assert fused == []


def test_no_factors_change_nothing(fused):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Unchanged()):
            assert torch.equal(zoo.model(**inputs).logits, plain)
    assert fused == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_methods_may_ask_for_weights_of_any_row(family):
    seen = []

    @dataclass(frozen=True)
    class AsksForWeights(AttentionMethod):
        """Reads the row it changes, and in the prompt one that it does not."""

        id: ClassVar[str] = "test-asks-for-weights"
        rows: ClassVar[str] = "last"

        def layers(self, family):
            return [1]

        def scale_heads(self, queries, outputs, context):
            seen.append(context.weights_of(context.rows))
            if context.is_prefill:
                second = context.layout.valid.int().argmax(dim=1, keepdim=True) + 1
                seen.append(context.weights_of(second))
            return torch.full((1, outputs.shape[1], 1, 1), 2.0)

    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, AsksForWeights()):
        zoo.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    with torch.no_grad():
        expected = eager.model(**inputs, output_attentions=True).attentions[1]
    last, second, decoded = seen
    # Two softmaxes over the same logits; 1e-6 is a few ulps of a weight.
    torch.testing.assert_close(last[:, :, 0], expected[:, :, -1], atol=1e-6, rtol=1e-5)
    for row, first in enumerate(inputs["attention_mask"].argmax(dim=1).tolist()):
        torch.testing.assert_close(second[row, :, 0], expected[row, :, first + 1], atol=1e-6, rtol=1e-5)
    assert decoded.shape == (2, 4, 1, inputs["input_ids"].shape[1] + 1)
    torch.testing.assert_close(decoded.sum(dim=-1), torch.ones(2, 4, 1))
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    assert not decoded[:, :, 0, :-1].transpose(1, 2)[padding].any()
