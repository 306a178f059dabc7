"""Each step of the steering engine against plain forward hooks, in every way a prompt is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.attention.steering import SteeringMethod
from tests.engines.steerers import (
    SEVERAL,
    TOLERANCE,
    Blend,
    Push,
    PushVision,
    Watch,
    generate,
    logits_of,
    naive_blend,
    push,
)
from tests.reference.attention import full_logits
from tests.reference.decoding import noised_inputs
from tests.reference.steering import hooked
from tests.zoo import FAMILIES, IMAGE, build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_equals_plain_hooks_at_prefill_and_decode(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Push(), Blend()):
        answer, logits = generate(zoo, inputs)
    plain = full_logits(zoo.model, inputs, answer[:, :-1])[:, -3:]
    with hooked(zoo.model, mlp=push, **naive_blend()):
        expected = full_logits(zoo.model, inputs, answer[:, :-1])[:, -3:]
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-2, "an edit that changes nothing proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_mlps_are_edited_in_the_layers_named(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, PushVision()) as patch:
        layers = patch.family.vision_layers
        edited = logits_of(zoo, inputs)
    handles = [
        layers[i].mlp.register_forward_hook(lambda module, args, output, i=i: output * (1.5 + i)) for i in (0, 1)
    ]
    expected = logits_of(zoo, inputs)
    for handle in handles:
        handle.remove()
    assert torch.equal(edited, expected)
    assert (edited - logits_of(zoo, inputs)).abs().max() > 1e-2


def test_several_methods_edit_in_the_order_in_which_they_were_given():
    @dataclass(frozen=True)
    class Double(SteeringMethod):
        id: ClassVar[str] = "test-double"

        def edit_mlp(self, inputs, outputs, context):
            return outputs * 2

    zoo = build("llava")
    inputs = zoo.inputs()
    with lmmhooks.wrap(zoo.model, Push(), Double()):
        logits = logits_of(zoo, inputs)
    with hooked(zoo.model, mlp=lambda *args: push(*args) * 2):
        assert torch.equal(logits, logits_of(zoo, inputs))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
def test_context_says_which_positions_are_real(family, padding):
    zoo = build(family)
    inputs = zoo.inputs(batch=3, padding=padding)
    method = Watch()
    with lmmhooks.wrap(zoo.model, method):
        logits_of(zoo, inputs)
        prompt = method.seen.copy()
        if padding == "left":
            method.seen.clear()
            generate(zoo, inputs)
    real = inputs["attention_mask"].bool()
    for context in prompt:
        assert context.is_prefill
        assert torch.equal(context.valid, real)
        assert context.last.flatten().tolist() == [int(row.nonzero().max()) for row in real]
    for context in method.seen[4:] if padding == "left" else ():
        assert not context.is_prefill
        assert context.valid.tolist() == [[True]] * 3
        assert context.last.tolist() == [[0]] * 3


def test_logits_in_a_context_are_those_of_the_unpatched_head():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    answers = []

    @dataclass(frozen=True)
    class Ask(SteeringMethod):
        id: ClassVar[str] = "test-ask"

        def edit_mlp(self, inputs, outputs, context):
            answers.append(context.logits(states))
            return outputs

    # Blend's hook on the final norm must not see what is asked on the way.
    with lmmhooks.wrap(zoo.model, Ask(), Blend()):
        logits_of(zoo, inputs)
    with torch.no_grad():
        expected = zoo.model.lm_head(zoo.model.model.language_model.norm(states))
    assert len(answers) == 4
    assert all(torch.equal(answer, expected) for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_a_batch_equals_its_prompt_alone(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=3)
    with lmmhooks.wrap(zoo.model, Watch(), Blend()):
        tokens, logits = generate(zoo, inputs)
        for row in range(3):
            one, one_logits = generate(zoo, zoo.row(inputs, row))
            assert torch.equal(tokens[row : row + 1], one)
            # Padding changes the order of summation in six sums per layer; largest difference seen is 7e-6.
            torch.testing.assert_close(logits[row : row + 1], one_logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "reducers", [("random(keep=4)",), ("fastv(keep=4, layer=2)",), ("random(keep=6)", "fastv(keep=3, layer=2)")]
)
@pytest.mark.parametrize("family", SEVERAL)
def test_states_of_a_shortened_prompt_return_to_their_places(family, reducers):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    seen = {}

    @dataclass(frozen=True)
    class Place(Blend):
        id: ClassVar[str] = "test-place"

        def mix_output(self, normed, context):
            assert torch.equal(context.valid, inputs["attention_mask"].bool())
            onto = torch.full_like(normed, 7.0)
            for layer in (1, 2):
                hidden, spread = context.memory[layer]
                seen[layer] = hidden, spread(hidden, onto)
            assert (onto == 7).all(), "the tensor given must stay as it is"
            return normed

    with lmmhooks.wrap(zoo.model, *reducers, Place()):
        logits_of(zoo, inputs)
        stages = {layer: find_runtime(zoo.model).last.stage_at(layer) for layer in (1, 2)}
    lengths = []
    for layer, (hidden, placed) in seen.items():
        lengths.append(hidden.shape[1])
        index = stages[layer].index
        for row in range(2):
            expected = torch.full_like(placed[row], 7.0)
            for column in range(hidden.shape[1]):
                position = column if index is None else int(index[row, column])
                if position >= 0:
                    expected[position] = hidden[row, column]
            assert torch.equal(placed[row], expected)
    assert min(lengths) < inputs["input_ids"].shape[1], "nothing was removed"


@pytest.mark.parametrize("reducer", ["random(keep=4)", "fastv(keep=4, layer=2)"])
@pytest.mark.parametrize("family", SEVERAL)
def test_a_shortened_prompt_is_steered_as_a_single_one(family, reducer):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, reducer, Watch(), Blend()):
        whole = logits_of(zoo, inputs)
        tokens, logits = generate(zoo, inputs)
        one, one_logits = generate(zoo, zoo.row(inputs, 0))
    with lmmhooks.wrap(zoo.model, reducer):
        _, unsteered = generate(zoo, inputs)
    assert whole.shape[1] == inputs["input_ids"].shape[1]
    assert (logits - unsteered).abs().amax(dim=(0, 2)).min() > 1e-2
    assert torch.equal(tokens[:1], one)
    torch.testing.assert_close(logits[:1], one_logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(whole[:, -1], logits[:, 0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", SEVERAL)
def test_all_logits_and_some_of_them_agree(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Push(), Blend()):
        everything = logits_of(zoo, inputs)
        some = logits_of(zoo, inputs, logits_to_keep=3)
    with hooked(zoo.model, mlp=push, **naive_blend()):
        expected = full_logits(zoo.model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(everything[real], expected[real], atol=TOLERANCE, rtol=0)
    # One product over fewer rows; largest difference seen is 1e-6.
    torch.testing.assert_close(some, everything[:, -3:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", SEVERAL)
def test_rows_without_image_stand_beside_rows_with_one(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=3, images=[1, 0, 1])
    method = Watch()
    with lmmhooks.wrap(zoo.model, method, Blend()):
        tokens, logits = generate(zoo, inputs)
        passes = method.prepared.copy()
        one, one_logits = generate(zoo, zoo.row(inputs, 0))
    assert torch.equal(tokens[:1], one)
    torch.testing.assert_close(logits[:1], one_logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(passes["with"][:, 1], passes["without"][:, 1], atol=TOLERANCE, rtol=0)
    assert (passes["with"][:, 0] - passes["without"][:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_branches_are_steered_like_prompts_of_their_own(family, lazy):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    noised = noised_inputs(zoo, inputs)
    method = Watch()
    with lmmhooks.wrap(zoo.model, method, Blend(), lmmhooks.method("vcd", alpha=1.0, beta=0.01, lazy=lazy)):
        answer, logits = generate(zoo, inputs)
        rows = method.prepared["with"].shape[1]
    # One prompt of all rows, or the branch rows after those of the caller.
    assert rows == (2 if lazy else 4)
    with lmmhooks.wrap(zoo.model, Watch(), Blend()):
        main, other = (full_logits(zoo.model, prompt, answer[:, :-1])[:, -3:] for prompt in (inputs, noised))
    assert (main - other).abs().max() > 1e-2, "both branches read the same image"
    kept = logits.isfinite()
    assert kept.sum() > 20, "the plausibility cut leaves next to nothing to compare"
    # The contrast triples the rounding of each.
    torch.testing.assert_close(logits[kept], (2 * main - other)[kept], atol=3 * TOLERANCE, rtol=0)


def test_continuing_with_several_tokens_is_steered_like_reading_them_at_once():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    assert int(inputs["input_ids"][0, -3:].max()) != IMAGE
    begin = {"input_ids": inputs["input_ids"][:, :-3], "pixel_values": inputs["pixel_values"]}
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Push(), Blend()):
        whole = zoo.model(**inputs).logits
        cache = zoo.model(**begin).past_key_values
        rest = zoo.model(input_ids=inputs["input_ids"][:, -3:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, -3:], atol=TOLERANCE, rtol=0)
