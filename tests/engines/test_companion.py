"""The reading without images that advances beside the prompt, against forwards of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.engines.passes import PlainPasses
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.attention.base import AttentionMethod
from tests.reference.vhr import last_outputs, without_image
from tests.zoo import FAMILIES, build

# float32 through four layers, padded or not; largest difference seen is 2e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Contrast(AttentionMethod):
    """Notes what it is shown, and gives every head of both readings another gain."""

    id: ClassVar[str] = "test-contrast"
    rows: ClassVar[str] = "all"
    listed: tuple[int, ...] = (1, 3)
    seen: dict[int, tuple[Any, Any]] = field(default_factory=dict, compare=False)
    fails: bool = False

    @property
    def contrasts_text(self) -> bool:
        return True

    def layers(self, family):
        return self.listed

    def choose_heads(self, outputs, without_image, context):
        if self.fails:
            raise ArithmeticError("heads cannot be compared")
        self.seen[context.layer] = outputs.clone(), without_image.clone()
        # Beside a row without an image the reading is the prompt itself: gains of its own would tell.
        gains = torch.linspace(0.5, 2.0, outputs.shape[1]).expand(outputs.shape[0], -1)
        context.memory[context.layer] = gains
        return gains

    def scale_heads(self, queries, outputs, context):
        return context.memory[context.layer][:, :, None, None]


GAINS = torch.linspace(0.5, 2.0, 4).tolist()


def check(zoo, inputs, method, row):
    """Both readings of one row at every stop, against runs of the whole model that scale the stops before it."""
    for stop in method.listed:
        below = {layer: GAINS for layer in method.listed if layer < stop}
        alone = zoo.row(inputs, row)
        for seen, prompt in zip(method.seen[stop], (alone, without_image(zoo.model, alone)), strict=True):
            expected = torch.tensor(last_outputs(zoo.model, prompt, below, stop))
            torch.testing.assert_close(seen[row], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_readings_equal_forwards_of_their_own(family, padding):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[1, 2], padding=padding)
    method = Contrast()
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs)
    for row in range(2):
        check(zoo, inputs, method, row)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_generate_compares_once_per_prompt(attn):
    zoo = build("qwen2_5_vl", attn=attn)
    inputs = zoo.inputs(batch=2)
    method = Contrast(listed=(0, 2, 3))
    with lmmhooks.wrap(zoo.model, method):
        zoo.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        first = dict(method.seen)
        method.seen.clear()
        zoo.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert sorted(first) == [0, 2, 3]
    for layer, (with_image, without) in method.seen.items():
        assert torch.equal(first[layer][0], with_image)
        assert torch.equal(first[layer][1], without)
    check(zoo, inputs, method, 1)


def test_layers_of_different_types_are_called_with_their_own_mask():
    """A layer between two stops attends to a window of four tokens, shorter than the text."""
    zoo = build(
        "qwen2_5_vl",
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
    )
    inputs = zoo.inputs(batch=1, text=9)
    method = Contrast(listed=(0, 3))
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method):
        zoo.model(**inputs, use_cache=False)
    _, without = method.seen[3]
    prompt = without_image(zoo.model, inputs)
    expected = torch.tensor(last_outputs(zoo.model, prompt, {0: GAINS}, 3))
    torch.testing.assert_close(without[0], expected, atol=TOLERANCE, rtol=0)
    zoo.model.config.text_config.sliding_window = zoo.model.model.language_model.config.sliding_window = 100
    wide = torch.tensor(last_outputs(zoo.model, prompt, {0: GAINS}, 3))
    assert (wide - expected).abs().max() > 1e-3, "a window that hides nothing proves nothing"


@pytest.mark.parametrize("reducer", ["random(keep=4)", "fastv(keep=4, layer=2)"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_reducers_leave_the_text_alone(family, reducer):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    whole, cut = Contrast(), Contrast()
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, whole):
            zoo.model(**inputs)
        with lmmhooks.wrap(zoo.model, cut, reducer):
            zoo.model(**inputs)
    for layer in whole.listed:
        torch.testing.assert_close(cut.seen[layer][1], whole.seen[layer][1], atol=TOLERANCE, rtol=0)
    assert (cut.seen[3][0] - whole.seen[3][0]).abs().max() > 1e-3


def test_branches_have_readings_of_their_own():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    method = Contrast()
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method, "vcd(beta=0.0)"):
        zoo.model(**inputs)
    for with_image, without in method.seen.values():
        assert with_image.shape[0] == without.shape[0] == 4
        torch.testing.assert_close(without[:2], without[2:], atol=TOLERANCE, rtol=0)
        assert (with_image[:2] - with_image[2:]).abs().amax(dim=(1, 2)).min() > 1e-3, "the noised image"
    for row in range(2):
        check(zoo, inputs, method, row)


def test_prompts_without_an_image_are_not_read_twice(monkeypatch):
    zoo = build("llava")
    calls = []
    run = PlainPasses.run
    monkeypatch.setattr(
        PlainPasses, "run", lambda self, *args, **kwargs: calls.append(args) or run(self, *args, **kwargs)
    )

    @dataclass(frozen=True)
    class Bare(Contrast):
        id: ClassVar[str] = "test-bare"

        def scale_heads(self, queries, outputs, context):
            assert not context.memory
            return None

    ids = torch.randint(8, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = zoo.model(input_ids=ids).logits
        with lmmhooks.wrap(zoo.model, Bare()):
            assert torch.equal(zoo.model(input_ids=ids).logits, plain)
            assert not calls
    with torch.no_grad(), lmmhooks.wrap(zoo.model, Contrast()):
        zoo.model(**zoo.inputs())
    assert calls == [(False,)], "one short pass, up to the first stop"


def test_the_reading_stays_out_of_what_the_caller_asked_to_see():
    zoo = build("llava", attn="eager")
    inputs = zoo.inputs(batch=2)
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        plain = zoo.model(**inputs, **asked)
        with lmmhooks.wrap(zoo.model, Contrast()):
            patched = zoo.model(**inputs, **asked)
    for name in ("attentions", "hidden_states"):
        assert [x.shape for x in patched[name]] == [x.shape for x in plain[name]]
    assert torch.equal(patched.attentions[0], plain.attentions[0])
    assert not torch.equal(patched.attentions[2], plain.attentions[2])


def hooks(model):
    return [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
        if getattr(module, kind)
    ]


def test_removal_leaves_no_trace():
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        before = hooks(zoo.model)
        attributes = {name: set(vars(module)) for name, module in zoo.model.named_modules()}
        with lmmhooks.wrap(zoo.model, Contrast()) as patch:
            attached = hooks(zoo.model)
            zoo.model(**inputs)
            assert hooks(zoo.model) == attached, "a pass leaves its hooks behind"
            assert patch._runtime.last.companion is None, "hidden states of a prompt that has been read are kept"
        assert hooks(zoo.model) == before
        assert {name: set(vars(module)) for name, module in zoo.model.named_modules()} == attributes
        assert torch.equal(zoo.model(**inputs).logits, plain)


def test_an_error_while_heads_are_compared_leaves_a_working_patch():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Contrast(fails=True)):
            attached = hooks(zoo.model)
            runtime = find_runtime(zoo.model)
            with pytest.raises(ArithmeticError):
                zoo.model(**inputs)
            assert runtime.current is None
            assert not runtime.listeners
            assert runtime.last.companion is None
            assert hooks(zoo.model) == attached
            # Still patched: a model that took itself for unpatched would not compare anything.
            with pytest.raises(ArithmeticError):
                zoo.model(**inputs)
        assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_methods_that_compare_heads_are_refused():
    zoo = build("llava")

    @dataclass(frozen=True)
    class Second(Contrast):
        id: ClassVar[str] = "test-second"

    with pytest.raises(lmmhooks.MethodError, match="both compare heads"):
        lmmhooks.wrap(zoo.model, Contrast(), Second())
    with lmmhooks.wrap(zoo.model, "vhr"), pytest.raises(lmmhooks.MethodError, match="both compare heads"):
        lmmhooks.wrap(zoo.model, Second())
    assert not zoo.model._forward_pre_hooks
