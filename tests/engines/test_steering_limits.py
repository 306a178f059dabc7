"""What steering leaves behind, the passes it may ask for, and where weights and caches are not the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from tests.engines.steerers import (
    SEVERAL,
    TOLERANCE,
    Blend,
    Push,
    PushVision,
    Watch,
    generate,
    logits_of,
)
from tests.reference.steering import last_states, without_image
from tests.zoo import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_leaves_no_hook_and_no_difference(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in zoo.model.modules()]

    plain = logits_of(zoo, inputs)
    # Counted after a forward, in which transformers installs hooks of its own.
    before = hooks()
    with lmmhooks.wrap(zoo.model, Push(), Blend(), PushVision()) as patch:
        assert hooks() != before
        steered = logits_of(zoo, inputs)
        with patch.disabled():
            assert patch.attached == []
            assert torch.equal(logits_of(zoo, inputs), plain)
        assert torch.equal(logits_of(zoo, inputs), steered)
    assert hooks() == before
    assert torch.equal(logits_of(zoo, inputs), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_before_the_prompt_are_those_of_the_plain_model(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    rows = [zoo.row(inputs, row) for row in range(2)]
    method = Watch()
    with lmmhooks.wrap(zoo.model, method):
        logits_of(zoo, inputs)
    for row, one in enumerate(rows):
        for name, prompt in (("with", one), ("without", without_image(zoo.model, one))):
            expected = torch.stack(last_states(zoo.model, prompt))
            torch.testing.assert_close(method.prepared[name][:, row], expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(method.prepared["first"][row], logits_of(zoo, one)[0, -1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", SEVERAL)
def test_passes_leave_nothing_in_the_output(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs, output_hidden_states=True)
        with lmmhooks.wrap(zoo.model, Watch()):
            out = zoo.model(**inputs, output_hidden_states=True)
            logits, *_ = zoo.model(**inputs, return_dict=False)
    assert len(out.hidden_states) == len(plain.hidden_states)
    assert torch.equal(out.hidden_states[0], plain.hidden_states[0])
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert torch.equal(logits, out.logits)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_cache_of_fixed_length_gives_the_same_answer(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    method = Watch()
    with lmmhooks.wrap(zoo.model, method, Blend()):
        growing, logits = generate(zoo, inputs)
        before = method.prepared.copy()
        fixed, fixed_logits = generate(zoo, inputs, cache_implementation="static")
    assert torch.equal(growing, fixed)
    torch.testing.assert_close(logits, fixed_logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(before["with"], method.prepared["with"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("step", ["prepare", "edit_mlp", "read_layer", "mix_output"])
def test_an_error_in_a_step_leaves_nothing_behind(step):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = logits_of(zoo, inputs)
    fails = [True]

    def raising(self, *args):
        if fails[0]:
            raise RuntimeError("inside the step")
        return getattr(Blend, step)(self, *args)

    broken = dataclass(frozen=True)(
        type("Broken", (Blend,), {"id": "test-broken", step: raising, "__annotations__": {}})
    )
    with lmmhooks.wrap(zoo.model, broken(), "fastv(keep=4, layer=2)"):
        with pytest.raises(RuntimeError, match="inside the step"):
            logits_of(zoo, inputs)
        assert find_runtime(zoo.model).current is None
        fails[0] = False
        recovered = logits_of(zoo, inputs)
    with lmmhooks.wrap(zoo.model, Blend(), "fastv(keep=4, layer=2)"):
        assert torch.equal(recovered, logits_of(zoo, inputs))
    assert torch.equal(logits_of(zoo, inputs), plain)


def test_an_error_inside_a_pass_leaves_the_prompt_followed():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    norm = zoo.model.model.language_model.norm
    hooks = len(norm._forward_pre_hooks)

    def fail(module, args):
        raise RuntimeError("inside the pass")

    with lmmhooks.wrap(zoo.model, Watch()):
        attached = len(norm._forward_pre_hooks)
        handle = norm.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside the pass"):
            logits_of(zoo, inputs)
        handle.remove()
        runtime = find_runtime(zoo.model)
        assert runtime.current is None
        assert not runtime.listeners
        assert len(norm._forward_pre_hooks) == attached
        assert torch.isfinite(logits_of(zoo, inputs)).all()
    assert len(norm._forward_pre_hooks) == hooks


def test_weights_that_accelerate_loads_on_demand():
    accelerate = pytest.importorskip("accelerate")
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)

    @dataclass(frozen=True)
    class Ask(Watch):
        id: ClassVar[str] = "test-ask"

        def edit_mlp(self, inputs, outputs, context):
            return outputs + 0.1 * context.logits(inputs)[..., : outputs.shape[-1]]

    method = Ask()
    with lmmhooks.wrap(zoo.model, method, Blend()):
        expected, first = logits_of(zoo, inputs), method.prepared["first"]
    accelerate.cpu_offload(zoo.model, execution_device=torch.device("cpu"))
    assert zoo.model.lm_head.weight.device.type == "meta"
    method = Ask()
    with lmmhooks.wrap(zoo.model, method, Blend()):
        assert torch.equal(logits_of(zoo, inputs), expected)
    assert torch.equal(method.prepared["first"], first)


def test_an_mlp_that_returns_no_states_is_refused_by_name():
    class Routed(nn.Module):
        def forward(self, hidden):
            return hidden.flatten(0, 1), None

    zoo = build("llava")
    zoo.model.model.language_model.layers[2].mlp = Routed()
    with (
        lmmhooks.wrap(zoo.model, Push()),
        pytest.raises(lmmhooks.ModelError, match=r"Routed in decoder layer 2 returns a tuple"),
    ):
        logits_of(zoo, zoo.inputs())
