"""Forwards of the unpatched decoder before a prompt is read: attention outputs, weights, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import lmmhooks
from lmmhooks.methods.attention.base import AttentionMethod
from tests.reference.attention import full_logits
from tests.reference.vhr import last_outputs, without_image
from tests.zoo import BOS, FAMILIES, IMAGE, build

# float32 through four layers, padded or not; largest difference seen is 2e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ask(AttentionMethod):
    """Asks for everything a prompt can be asked for, and doubles every head on the way."""

    id: ClassVar[str] = "test-ask"
    rows: ClassVar[str] = "all"
    listed: tuple[int, ...] = (1, 3)
    seen: dict[Any, Any] = field(default_factory=dict, compare=False)

    def layers(self, family):
        return self.listed

    def prepare(self, prompt):
        for image in (True, False):
            self.seen["heads", image] = prompt.passes.head_outputs(self.listed, image=image)
            self.seen["hidden", image] = prompt.passes.last_hidden(image)
            self.seen["logits", image] = prompt.passes.first_logits(image)

    def scale_heads(self, queries, outputs, context):
        return torch.full((1, 1, 1, 1), 2.0)


@dataclass(frozen=True)
class LookAhead(AttentionMethod):
    """Watches the last row of a layer above the first that it edits."""

    id: ClassVar[str] = "test-look-ahead"
    seen: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)

    def watched(self, family):
        return {2: "last"}

    def watch(self, weights, real, context):
        assert bool(real.all())
        self.seen[context.layer] = weights.clone()

    def edit_weights(self, weights, context):
        return weights.roll(1, dims=1)


def read(zoo, inputs, *methods):
    with torch.no_grad(), lmmhooks.wrap(zoo.model, *methods):
        return zoo.model(**inputs)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_outputs_and_logits_are_those_of_each_prompt_alone(family, padding):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[1, 2], padding=padding)
    method = Ask()
    read(zoo, inputs, method)
    for row in range(2):
        alone = zoo.row(inputs, row)
        for image, prompt in ((True, alone), (False, without_image(zoo.model, alone))):
            logits = full_logits(zoo.model, prompt)[0, -1]
            torch.testing.assert_close(method.seen["logits", image][row], logits, atol=TOLERANCE, rtol=0)
            for layer in method.listed:
                expected = torch.tensor(last_outputs(zoo.model, prompt, {}, layer))
                torch.testing.assert_close(method.seen["heads", image][layer][row], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(
    "others", [["random(keep=4)"], ["fastv(keep=4, layer=2)"], ["vaf(enh=1.5, start=0, end=4)"], [LookAhead()]]
)
def test_other_methods_do_not_reach_a_pass(family, others):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    alone, beside = Ask(), Ask()
    read(zoo, inputs, alone)
    read(zoo, inputs, *others, beside)
    for key, value in alone.seen.items():
        if isinstance(value, dict):
            for layer in value:
                assert torch.equal(beside.seen[key][layer], value[layer])
        else:
            assert torch.equal(beside.seen[key], value)


def test_branches_ask_for_themselves():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    alone, stacked = Ask(), Ask()
    read(zoo, inputs, alone)
    read(zoo, inputs, stacked, "vcd(beta=0.0)")
    both = stacked.seen["logits", True]
    assert both.shape[0] == 4
    torch.testing.assert_close(both[:2], alone.seen["logits", True], atol=TOLERANCE, rtol=0)
    assert (both[2:] - both[:2]).abs().max() > 1e-2
    torch.testing.assert_close(stacked.seen["logits", False][2:], alone.seen["logits", False])


def test_each_reading_runs_once_and_ends_where_it_can():
    zoo = build("llava", layers=6)
    inputs = zoo.inputs(batch=1)
    calls = dict.fromkeys(range(6), 0)
    handles = [
        module.register_forward_pre_hook(lambda module, args, layer=layer: calls.update({layer: calls[layer] + 1}))
        for layer, module in enumerate(zoo.model.model.language_model.layers)
    ]
    method = Ask(listed=(1, 2))
    read(zoo, inputs, method)
    for handle in handles:
        handle.remove()
    # Prompt, two whole passes shared by states and logits, and two that end after layer 2.
    assert calls == {0: 5, 1: 5, 2: 5, 3: 3, 4: 3, 5: 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_above_the_first_edit_are_watched_unedited(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    method = LookAhead()
    patched = read(zoo, inputs, method).logits
    eager = build(family, attn="eager")
    with torch.no_grad():
        plain = eager.model(**inputs, output_attentions=True)
    torch.testing.assert_close(method.seen[2][:, :, 0], plain.attentions[2][:, :, -1], atol=1e-6, rtol=1e-5)
    assert (patched - plain.logits)[:, -1].abs().max() > 1e-2


def test_layers_below_the_first_edit_are_watched_without_a_pass():
    @dataclass(frozen=True)
    class Later(LookAhead):
        id: ClassVar[str] = "test-later"

        def layers(self, family):
            return [3]

    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    calls = []
    handle = zoo.model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    beforehand, on_the_way = LookAhead(), Later()
    read(zoo, inputs, beforehand)
    assert len(calls) == 2
    read(zoo, inputs, on_the_way)
    handle.remove()
    assert len(calls) == 3
    torch.testing.assert_close(on_the_way.seen[2], beforehand.seen[2], atol=1e-6, rtol=1e-5)


def test_a_prompt_of_nothing_but_its_image_is_refused():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    inputs["input_ids"] = torch.full((1, 16), IMAGE)
    inputs["attention_mask"] = torch.ones(1, 16, dtype=torch.long)
    with pytest.raises(lmmhooks.PromptError, match="nothing is left of a prompt without its image"):
        read(zoo, inputs, "vhr")
    inputs["input_ids"] = torch.tensor([[BOS] + [IMAGE] * 16])
    inputs["attention_mask"] = torch.ones(1, 17, dtype=torch.long)
    assert torch.isfinite(read(zoo, inputs, "vhr").logits).all()


def test_a_pass_that_cannot_begin_leaves_no_hook():
    @dataclass(frozen=True)
    class TooDeep(Ask):
        id: ClassVar[str] = "test-too-deep"

        def prepare(self, prompt):
            prompt.passes.run(True, inputs={0: lambda hidden, arguments: None}, through=99)

    zoo = build("llava")
    first = zoo.model.model.language_model.layers[0]
    with lmmhooks.wrap(zoo.model, TooDeep(listed=(1,))), torch.no_grad():
        before = len(first._forward_pre_hooks)
        with pytest.raises(IndexError):
            zoo.model(**zoo.inputs())
        assert len(first._forward_pre_hooks) == before
