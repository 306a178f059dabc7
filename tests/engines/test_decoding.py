"""The decoding engine: rows of branches in one forward per step, whatever the branches, the family and the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import TextStreamer

import lmmhooks
from lmmhooks.engines.branch_cache import BranchCache
from lmmhooks.engines.branch_vision import image_generator
from lmmhooks.family import resolve
from lmmhooks.methods.attention.var import Var
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.vcd import Vcd
from lmmhooks.methods.decoding.view import StepView
from tests.reference.decoding import NaiveBranches, naive_generate, noised_inputs, without_image
from tests.zoo import FAMILIES, build

# float32 through four layers in other batches, times weights that reach 4.5; largest difference seen is 2.1e-5.
TOLERANCE = 5e-5
STEPS = 4


@dataclass(frozen=True)
class NoImage(DecodingMethod):
    """Weights that grow with the step, so that a step counted wrongly shows."""

    id: ClassVar[str] = "test-no-image"

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("text", image="none")]

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1.5 + step, -0.5 - step]


@dataclass(frozen=True)
class Edited(DecodingMethod):
    """Two tokens in front of the last one of the prompt, image kept; and the same tokens without image."""

    id: ClassVar[str] = "test-edited"

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("leading", text="edited"), Branch("both", image="none", text="edited")]

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        return torch.cat([tokens[:-1], tokens.new_tensor([11, 12]), tokens[-1:]])

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [2.0, -0.75, -0.25]


@dataclass(frozen=True)
class Several(DecodingMethod):
    """A branch of every kind."""

    id: ClassVar[str] = "test-several"
    seed: int = 3

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("text", image="none"), Branch("copy"), Branch("a", image="pixels"), Branch("b", image="pixels")]

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        return pixels + torch.randn(pixels.shape, generator=generator)

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1.0, -0.5, 0.5, 0.75, -0.75]


def weighted(method: DecodingMethod) -> Any:
    """The formula of a method without plausibility cut, for one row."""

    def combine(main: Tensor, others: list[Tensor], step: int) -> Tensor:
        weights = method.weights(main, others, step, None)
        return sum(weight * logits for weight, logits in zip(weights, [main, *others], strict=True))

    return combine


def visual_ids(zoo: Any) -> tuple[int, ...]:
    return resolve(zoo.model).visual_ids


def with_edit(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of `Edited`, of left-padded rows."""
    out = dict(inputs)
    new = torch.tensor([[11, 12]]).expand(len(inputs["input_ids"]), -1)
    for name, extra in (
        ("input_ids", new),
        ("attention_mask", torch.ones_like(new)),
        ("mm_token_type_ids", torch.zeros_like(new)),
    ):
        if name in inputs:
            value = inputs[name]
            out[name] = torch.cat([value[:, :-1], extra.to(value), value[:, -1:]], dim=1)
    return out


def generated(zoo: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    kwargs = {"max_new_tokens": STEPS, "do_sample": False, **kwargs}
    return zoo.model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **kwargs)


def check_against_naive(zoo: Any, inputs: dict[str, Any], method: DecodingMethod, others: list[dict[str, Any]]) -> None:
    with lmmhooks.wrap(zoo.model, method):
        out = generated(zoo, inputs)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    naive = NaiveBranches(zoo.model, inputs, others, weighted(method))
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, naive.logits(answer[:, :step]), atol=TOLERANCE, rtol=0)


# -- branches against separate forwards ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_branch_without_image_has_its_own_length_and_positions(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    check_against_naive(zoo, inputs, NoImage(beta=0.0), [without_image(inputs, visual_ids(zoo))])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_edited_text_keeps_the_image_and_moves_what_follows(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    edited = with_edit(inputs)
    check_against_naive(zoo, inputs, Edited(beta=0.0), [edited, without_image(edited, visual_ids(zoo))])


@pytest.mark.parametrize("lazy", [False, True])
def test_branches_of_every_kind_at_once(lazy):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    # A cut so low that it drops nothing: lazy branches need one.
    method = Several(beta=1e-30 if lazy else 0.0, lazy=lazy)

    def variant(branch: Branch) -> dict[str, Any]:
        images = inputs["pixel_values"].split(1)
        context = BranchContext(family=None)
        changed = [
            method.transform_pixels(image, branch, image_generator(image, branch, 3), context) for image in images
        ]
        return {**inputs, "pixel_values": torch.cat(changed)}

    pixel_branches = method.branches(None)[2:]
    others = [without_image(inputs, visual_ids(zoo)), inputs, *map(variant, pixel_branches)]
    assert not torch.equal(others[2]["pixel_values"], others[3]["pixel_values"])
    check_against_naive(zoo, inputs, method, others)


def test_beams_with_branches_of_another_length():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2, images=(1, 2))
    method = NoImage(beta=0.0)
    others = [without_image(inputs, visual_ids(zoo))]
    arguments = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    expected = naive_generate(zoo.model, inputs, others, weighted(method), **arguments)
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(**inputs, **arguments)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_any_attention_backend(attn):
    zoo = build("llava", attn=attn)
    inputs = zoo.inputs(batch=2)
    check_against_naive(zoo, inputs, NoImage(beta=0.0), [without_image(inputs, visual_ids(zoo))])


# -- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "forwards"),
    # A branch without image is so much shorter than the main rows that it reads the prompt by itself.
    [(Vcd(beta=0.05), STEPS), (NoImage(beta=0.05), 1 + STEPS)],
    ids=["vcd", "no image"],
)
def test_one_forward_per_step_and_one_pass_of_the_vision_tower(method, forwards):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    calls = {"model": 0, "decoder": 0, "tower": 0}
    modules = {
        "model": zoo.model,
        "decoder": zoo.model.model.language_model,
        "tower": zoo.model.model.vision_tower,
    }
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        for name, module in modules.items()
    ]
    try:
        with lmmhooks.wrap(zoo.model, method):
            zoo.model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == {"model": forwards, "decoder": forwards, "tower": 1}


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl"])
def test_rows_of_a_batch_equal_single_prompts(family):
    """Also shows that the noise of an image does not depend on its neighbours."""
    zoo = build(family)
    one, two = zoo.inputs(text=4, seed=1), zoo.inputs(text=9, seed=2)
    length = two["input_ids"].shape[1]
    shift = length - one["input_ids"].shape[1]
    both = {}
    for name, value in one.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            value = torch.nn.functional.pad(value, (shift, 0))
        both[name] = torch.cat([value, two[name]])
    with lmmhooks.wrap(zoo.model, Vcd(beta=0.02)):
        singles = [generated(zoo, inputs) for inputs in (one, two)]
        batch = generated(zoo, both)
    for row, single in enumerate(singles):
        new = single.sequences[0, (one, two)[row]["input_ids"].shape[1] :]
        assert torch.equal(batch.sequences[row, length : length + len(new)], new)
        for step, logits in enumerate(single.logits):
            torch.testing.assert_close(batch.logits[step][row], logits[0], atol=TOLERANCE, rtol=0)


def test_crops_that_only_pad_the_batch_do_not_change_the_noise():
    zoo = build("llava_next")
    inputs = zoo.inputs()
    padded = dict(inputs)
    padded["pixel_values"] = torch.nn.functional.pad(inputs["pixel_values"], (0, 0, 0, 0, 0, 0, 0, 2))
    with lmmhooks.wrap(zoo.model, Vcd(beta=0.0)):
        logits = [generated(zoo, given).logits for given in (inputs, padded)]
    for one, other in zip(*logits, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


def test_streamer_and_returned_sequences_see_the_main_rows_only():
    zoo = build("llava")
    inputs = zoo.inputs()
    heard: list[Tensor] = []

    class Listener(TextStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value: Tensor) -> None:
            heard.append(value)

        def end(self) -> None:
            pass

    with lmmhooks.wrap(zoo.model, Vcd(beta=0.05)):
        out = zoo.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, streamer=Listener())
        several = zoo.model.generate(**inputs, max_new_tokens=STEPS, do_sample=True, num_return_sequences=3)
    assert torch.equal(torch.cat([value.flatten() for value in heard]), out[0])
    assert several.shape[0] == 3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", [Vcd(beta=0.0), NoImage(beta=0.0)], ids=lambda method: method.id)
def test_a_loop_of_plain_forwards_equals_generate(family, method):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, method), torch.no_grad():
        out = generated(zoo, inputs)
        answer = out.sequences[:, inputs["input_ids"].shape[1] :]
        step = zoo.model(**inputs)
        logits = [step.logits[:, -1]]
        for token in answer[:, :-1].split(1, dim=1):
            step = zoo.model(input_ids=token, past_key_values=step.past_key_values)
            assert step.logits.shape == (2, 1, logits[0].shape[-1])
            logits.append(step.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits), torch.stack(out.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_without_cache_the_tokens_and_the_step_count_are_the_same(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, NoImage(beta=0.0)):
        cached, uncached = generated(zoo, inputs), generated(zoo, inputs, use_cache=False)
    torch.testing.assert_close(torch.stack(uncached.logits), torch.stack(cached.logits), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lazy", [False, True])
def test_assisted_decoding_crops_every_branch(lazy, monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(text=8)
    # A prompt that repeats itself gives prompt lookup something to propose, and to be wrong about.
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]
    gone: list[int] = []
    crop = BranchCache.crop
    monkeypatch.setattr(BranchCache, "crop", lambda cache, num: (gone.append(num), crop(cache, num)))
    with lmmhooks.wrap(zoo.model, Vcd(beta=0.9, lazy=lazy)):
        plain = zoo.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        assisted = zoo.model.generate(**inputs, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, assisted)
    assert min(gone) < 0, "nothing was proposed that had to be taken back"


def test_all_positions_of_a_prompt_are_combined_where_branches_read_the_same_tokens():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, padding="right")
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        other = zoo.model(**noised_inputs(zoo, inputs)).logits
        with lmmhooks.wrap(zoo.model, Vcd(alpha=0.5, beta=0.0)):
            out = zoo.model(**inputs, output_hidden_states=True)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[valid], (1.5 * plain - 0.5 * other)[valid], atol=TOLERANCE, rtol=0)
    assert {len(states) for states in out.hidden_states} == {2}
    assert out.image_hidden_states is None


# -- lazy branches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("method", [Vcd, NoImage], ids=lambda method: method.id)
@pytest.mark.parametrize(
    "mode",
    [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_lazy_branches_change_nothing(family, method, mode):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    shares = []
    for beta in (0.3, 0.9):
        answers = []
        for lazy in (False, True):
            torch.manual_seed(0)
            with lmmhooks.wrap(zoo.model, method(beta=beta, lazy=lazy)) as patch:
                answers.append(zoo.model.generate(**inputs, max_new_tokens=8, **mode))
                shares.append(patch.stats.branch_steps)
        assert torch.equal(*answers)
    eager, lazy = shares[::2], shares[1::2]
    assert eager == [1.0, 1.0]
    assert all(share is not None and 0 <= share <= 1 for share in lazy)
    assert min(lazy) < 1, "a cut that never decides a step proves nothing"


def test_lazy_branches_of_a_decided_prompt_never_run():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    passes = []
    hook = zoo.model.model.vision_tower.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    with lmmhooks.wrap(zoo.model, Vcd(beta=1.0, lazy=True)) as patch:
        zoo.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        assert patch.stats.branch_steps == 0
    hook.remove()
    assert passes == [2], "no noised image was encoded"


# -- composition -----------------------------------------------------------------------------------------------------


def forced_logits(zoo: Any, inputs: dict[str, Any], answer: Tensor) -> Tensor:
    """Logits ``[t, B, vocabulary]`` of the model as it is wrapped, the answer given."""
    with torch.no_grad():
        out = zoo.model(**inputs, logits_to_keep=1)
        logits = [out.logits[:, -1]]
        for token in answer[:, :-1].split(1, dim=1):
            out = zoo.model(input_ids=token, past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    "below",
    [
        [Var(sink_dims="any", p=0.6, rho=0.3, min_visual=0.2, tau=2.6)],
        ["random(keep=0.5)"],
        ["fastv(keep=0.5)"],
        ["fastervlm(keep=0.5)"],
    ],
    ids=["var", "random", "fastv", "fastervlm"],
)
def test_methods_below_act_on_every_branch_as_if_it_were_alone(family, below, lazy):
    zoo = build(family, layers=5)
    inputs = zoo.inputs()
    with lmmhooks.wrap(zoo.model, *below, Vcd(alpha=0.5, beta=1e-30 if lazy else 0.0, lazy=lazy)):
        out = generated(zoo, inputs)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    with lmmhooks.wrap(zoo.model, *below):
        plain, other = (forced_logits(zoo, given, answer) for given in (inputs, noised_inputs(zoo, inputs)))
    torch.testing.assert_close(torch.stack(out.logits), 1.5 * plain - 0.5 * other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lazy", [False, True])
def test_readings_of_the_vision_tower_reach_branches_that_show_the_image_as_given(lazy):
    """Lazy branches enter long after the encoder call that the probes listened to, and no pixels are encoded again."""
    zoo = build("llava")
    inputs = zoo.inputs()
    edited = with_edit(inputs)
    with lmmhooks.wrap(zoo.model, "fastervlm(keep=4)", Edited(beta=1e-30 if lazy else 0.0, lazy=lazy)):
        out = generated(zoo, inputs)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    readings = (inputs, edited, without_image(edited, visual_ids(zoo)))
    with lmmhooks.wrap(zoo.model, "fastervlm(keep=4)"):
        main, leading, text = (forced_logits(zoo, given, answer) for given in readings)
    torch.testing.assert_close(torch.stack(out.logits), 2 * main - 0.75 * leading - 0.25 * text, atol=TOLERANCE, rtol=0)
