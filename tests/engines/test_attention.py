"""Each step of the attention engine against full attention matrices, on every backend that runs here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

import lmmhooks
from lmmhooks.engines import editing
from lmmhooks.engines.attention import AttentionEngine
from lmmhooks.engines.backend import PREFIX, base_name
from lmmhooks.engines.probes import DecoderProbe, VisionProbe
from lmmhooks.engines.rows import plan_rows, received_attention, row_scores, visible
from lmmhooks.engines.runtime import Runtime
from lmmhooks.family import resolve
from lmmhooks.methods.attention.base import AttentionMethod
from tests.reference.attention import dense_attention, full_logits
from tests.zoo import FAMILIES, IMAGE, build

# float32, a few layers, another order of summation; largest difference seen is 3e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ScaleKeys(AttentionMethod):
    id: ClassVar[str] = "test-scale-keys"

    def scale_keys(self, context):
        return 1.0 + 0.5 * context.layout.visual


@dataclass(frozen=True)
class BoostScores(AttentionMethod):
    id: ClassVar[str] = "test-boost-scores"
    rows: ClassVar[str] = "last"

    def edit_scores(self, scores, context):
        boosted = scores + 0.5 * scores.abs()
        return torch.where(context.layout.visual[:, None, None, :], boosted, scores)


@dataclass(frozen=True)
class GateHeads(AttentionMethod):
    id: ClassVar[str] = "test-gate-heads"
    rows: ClassVar[str] = "all"

    def scale_heads(self, queries, outputs, context):
        return torch.linspace(0.2, 2.0, outputs.shape[1])[None, :, None, None]


@dataclass(frozen=True)
class HalveFirst(AttentionMethod):
    """All rows, weights edited: the case that is split into blocks."""

    id: ClassVar[str] = "test-halve-first"
    rows: ClassVar[str] = "all"

    def edit_weights(self, weights, context):
        first = context.layout.valid.int().argmax(dim=1)
        scale = torch.ones(weights.shape[0], 1, 1, weights.shape[-1])
        scale[torch.arange(len(first)), 0, 0, first] = 0.5
        return weights * scale


def rows_of(ids, row, length, which):
    """Edited rows of one sample, found the slow way; ``length`` counts the answer too."""
    prompt = [int(t) for t in ids[row]] + [99] * (length - ids.shape[1])
    valid = [i for i, t in enumerate(prompt) if t != 0]
    if which == "all":
        return valid
    if which == "last":
        return [i for i in valid if i >= ids.shape[1] - 1]
    return [i for i in valid if prompt[i] != IMAGE and IMAGE in prompt[:i]]


def reference_of(method, ids):
    """The naive rendering of one of the methods above, as arguments of `dense_attention`."""

    def change(layer, values, row, hidden):
        image = torch.zeros(values.shape[1], dtype=torch.bool)
        image[: ids.shape[1]] = ids[row] == IMAGE
        for i in rows_of(ids, row, values.shape[1], method.rows):
            for h in range(values.shape[0]):
                if isinstance(method, ScaleKeys):
                    values[h, i, image] = values[h, i, image] * 1.5
                elif isinstance(method, BoostScores):
                    values[h, i, image] = values[h, i, image] + 0.5 * values[h, i, image].abs()
                elif isinstance(method, GateHeads):
                    values[h, i] = values[h, i] * float(torch.linspace(0.2, 2.0, values.shape[0])[h])
                else:
                    first = int((ids[row] != 0).int().argmax())
                    values[h, i, first] = values[h, i, first] * 0.5
        return values

    place = {ScaleKeys: "scores", BoostScores: "scores", GateHeads: "output", HalveFirst: "edit"}[type(method)]
    return {place: change}


def compare(zoo, method, steps=3, batch=2):
    inputs = zoo.inputs(batch=batch)
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -steps:]
    with dense_attention(zoo.model, **reference_of(method, inputs["input_ids"])):
        expected = full_logits(zoo.model, inputs, answer[:, :-1])[:, -steps:]
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-3, "an edit that changes nothing proves nothing"
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", [ScaleKeys(), BoostScores(), GateHeads(), HalveFirst()], ids=lambda m: m.id)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_every_step_equals_full_attention(family, method):
    compare(build(family), method)


@pytest.mark.parametrize("method", [ScaleKeys(), GateHeads()], ids=lambda m: m.id)
def test_eager_backend(method):
    compare(build("llava", attn="eager"), method, steps=2)


# The flex path of transformers goes through parts of torch that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("method", [ScaleKeys(), GateHeads()], ids=lambda m: m.id)
def test_flex_backend(method, monkeypatch):
    def uncompiled(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    # Compiling the kernel takes minutes and its C++ does not build on every CPU; the semantics are the same.
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    compare(build("llava", attn="flex_attention"), method, steps=2)


def test_long_plans_are_split_into_blocks(monkeypatch):
    monkeypatch.setattr(editing, "ROW_BLOCK", 5)
    compare(build("llava"), HalveFirst())
    compare(build("llava"), ScaleKeys())


def test_methods_with_different_rows_share_a_layer():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    ids = inputs["input_ids"]
    with torch.no_grad(), lmmhooks.wrap(zoo.model, ScaleKeys(), BoostScores(), GateHeads()):
        patched = zoo.model(**inputs).logits[:, -1]
    keys, boost = reference_of(ScaleKeys(), ids)["scores"], reference_of(BoostScores(), ids)["scores"]

    def both(layer, values, row, hidden):
        return boost(layer, keys(layer, values, row, hidden), row, hidden)

    with dense_attention(zoo.model, scores=both, **reference_of(GateHeads(), ids)):
        expected = full_logits(zoo.model, inputs)[:, -1]
    torch.testing.assert_close(patched, expected, atol=TOLERANCE, rtol=0)


def test_text_only_prompts_take_the_fused_path():
    zoo = build("llava")
    ids = torch.randint(8, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = zoo.model(input_ids=ids).logits
        with lmmhooks.wrap(zoo.model, ScaleKeys()):
            assert torch.equal(zoo.model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_probe_reads_the_attention_eager_reports(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    seen = {}
    runtime = Runtime(resolve(zoo.model))
    with torch.no_grad(), runtime.suspended() as attachments:
        probe = DecoderProbe(1, "last", lambda weights, real: seen.update(weights=weights, real=real))
        AttentionEngine(runtime, [], [probe]).attach(attachments)
        zoo.model(**inputs)
    eager = build(family, attn="eager")
    with torch.no_grad():
        expected = eager.model(**inputs, output_attentions=True).attentions[1][:, :, -1]
    assert seen["real"].all()
    # Two softmaxes over the same logits; 1e-6 is a few ulps of a weight.
    torch.testing.assert_close(seen["weights"][:, :, 0], expected, atol=1e-6, rtol=1e-5)


def vision_attention(family, layer, kind, inputs):
    zoo = build(family)
    readings = []
    runtime = Runtime(resolve(zoo.model))
    with torch.no_grad(), runtime.suspended() as attachments:
        AttentionEngine(runtime, [], (), [VisionProbe(layer, kind, readings.append)]).attach(attachments)
        zoo.model(**inputs)
    return readings


def dense_vision(family, layer, inputs):
    """Full attention matrices of one vision layer, one per attention call."""
    zoo = build(family)
    maps = []

    def attend(module, q, k, v, attention_mask, **kwargs):
        weights = torch.softmax(q @ k.transpose(2, 3) * kwargs["scaling"], dim=-1)
        if module is target:
            maps.append(weights)
        return (weights @ v).transpose(1, 2).contiguous(), None

    resolved = resolve(zoo.model)
    target = resolved.attention_of(resolved.vision_layers[layer])
    AttentionInterface.register("test_vision", attend)
    target.config._attn_implementation_internal = "test_vision"
    with torch.no_grad():
        zoo.model(**inputs)
    return maps


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_class_row_of_the_vision_tower(family):
    inputs = build(family).inputs(batch=2)
    readings = vision_attention(family, 1, "cls", inputs)
    maps = dense_vision(family, 1, inputs)
    assert len(readings) == len(maps)
    for reading, full in zip(readings, maps, strict=True):
        torch.testing.assert_close(reading, full[:, :, 0, 1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_received_attention_of_the_vision_tower(family):
    inputs = build(family).inputs(batch=2)
    readings = vision_attention(family, 1, "received", inputs)
    maps = dense_vision(family, 1, inputs)
    skip = int(resolve(build(family).model).has_cls)
    assert len(readings) == len(maps)
    for reading, full in zip(readings, maps, strict=True):
        expected = full[:, :, skip:].mean(dim=2)[..., skip:]
        torch.testing.assert_close(reading, expected, atol=1e-6, rtol=1e-5)


def test_received_attention_does_not_depend_on_the_block():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 37, 8, generator=generator) for _ in range(2))
    whole = received_attention(q, k, 0.35, block=37)
    torch.testing.assert_close(received_attention(q, k, 0.35, block=8), whole)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4))


def test_grouped_keys_are_read_as_repeated_ones():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 3, 8, generator=generator), torch.randn(2, 2, 5, 8, generator=generator)
    expected = q @ k.repeat_interleave(3, dim=1).transpose(2, 3) * 0.5
    torch.testing.assert_close(row_scores(q, k, 0.5), expected)


def test_rows_see_what_a_causal_mask_lets_them_see():
    index = torch.tensor([[1, 3], [0, 2]])
    dense = torch.ones(4, 6).tril(2).bool()[None, None].expand(2, -1, -1, -1)
    derived = visible(None, index, 4, 6, None, causal=True)
    assert torch.equal(visible(dense, index, 4, 6, None, causal=True), derived)
    valid = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    assert not visible(None, index, 4, 6, valid, causal=True)[0, :, :, 0].any()
    assert visible(None, index, 1, 6, None, causal=True) is None


def test_plans_pad_samples_with_fewer_rows():
    one = torch.tensor([[False, True, True, True], [False, False, False, True]])
    two = torch.tensor([[False, False, False, True], [False, False, False, True]])
    plan = plan_rows({"one": one, "two": two})
    assert plan.index[0].tolist() == [1, 2, 3]
    assert plan.index[1, 0] == 3
    assert plan.real.tolist() == [[True, True, True], [True, False, False]]
    assert plan.members["two"].tolist() == [[False, False, True], [True, False, False]]
    assert plan_rows({"none": torch.zeros(2, 3, dtype=torch.bool)}) is None


def test_flash_kernels_see_a_module_that_names_their_own_backend():
    """flash-attn cannot run on a CPU: what is checked is what it would be handed."""
    seen = {}

    def flash(module, q, k, v, attention_mask, **kwargs):
        seen.update(name=module.config._attn_implementation, causal=module.is_causal, mask=attention_mask)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=q.shape[2] > 1, scale=kwargs["scaling"]
        ).transpose(1, 2), None

    AttentionInterface.register("test_flash", flash)
    AttentionMaskInterface.register("test_flash", AttentionMaskInterface()["flash_attention_2"])
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        expected = None
        with lmmhooks.wrap(zoo.model, ScaleKeys()):
            expected = zoo.model(**zoo.inputs(batch=1)).logits
        zoo.model.model.language_model.config._attn_implementation_internal = "test_flash"
        with lmmhooks.wrap(zoo.model, ScaleKeys()):
            assert zoo.model.model.language_model.config._attn_implementation == PREFIX + "test_flash"
            assert base_name(zoo.model.model.language_model.config) == "test_flash"
            torch.testing.assert_close(zoo.model(**zoo.inputs(batch=1)).logits, expected, atol=TOLERANCE, rtol=0)
            assert seen["name"] == "test_flash"
            assert seen["causal"] is True
            zoo.model(**inputs)
            assert seen["mask"].shape == inputs["attention_mask"].shape, "padding reaches the kernel as a 2-D mask"


def test_paged_attention_is_refused():
    zoo = build("llava")
    zoo.model.model.language_model.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(lmmhooks.ModelError, match="in pages"):
        lmmhooks.wrap(zoo.model, ScaleKeys())
