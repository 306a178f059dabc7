"""What methods keep about generated tokens goes with the rows of the cache, and where rows and keys stand is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import pad

import lmmhooks
from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from tests.zoo import build


@dataclass(frozen=True)
class RememberKeys(AttentionMethod):
    """Collects the key of every generated token as it comes, and compares them with the cache at every step."""

    id: ClassVar[str] = "test-remember-keys"
    checked: ClassVar[list[int]] = []
    moved: ClassVar[list[bool]] = []

    def layers(self, family):
        return [2]

    def select_rows(self, rows, memory):
        self.moved.append(rows.tolist() != list(range(len(rows))))
        memory["keys"] = memory["keys"][rows]

    def edit_weights(self, weights, context):
        if context.is_prefill:
            context.memory["keys"] = context.keys[:, :, :0]
            return weights
        new = context.keys.shape[2] - context.num_cached
        context.memory["keys"] = torch.cat([context.memory["keys"], context.keys[:, :, -new:]], dim=2)
        generated = context.memory["keys"].shape[2]
        assert torch.equal(context.memory["keys"], context.keys[:, :, -generated:])
        assert torch.equal(context.positions[:, -1], torch.full((len(weights),), context.layout.length - 1))
        self.checked.append(generated)
        return weights


@pytest.fixture
def remember():
    RememberKeys.checked.clear()
    RememberKeys.moved.clear()
    return RememberKeys()


@pytest.mark.parametrize("others", [(), ("vcd(beta=0.0)",), ("vcd(beta=0.5, lazy=True)",)], ids=str)
def test_beams_take_the_state_of_their_answer_with_them(remember, others):
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, remember, *others):
        zoo.model.generate(**zoo.inputs(batch=2), num_beams=3, do_sample=False, max_new_tokens=6, min_new_tokens=6)
        assert "attribute model._reorder_cache" in lmmhooks.wrap(zoo.model, "attention-identity").attached
    lmmhooks.unwrap(zoo.model)
    assert max(remember.checked) == 5
    assert any(remember.moved), "beams that never change places prove nothing"
    assert not hasattr(zoo.model, "_reorder_cache")


def test_models_whose_methods_keep_nothing_about_the_answer_stay_as_they_are():
    zoo = build("llava")
    with lmmhooks.wrap(zoo.model, "attention-identity"):
        assert not hasattr(zoo.model, "_reorder_cache")


def context(index=None, length=5, prompt_length=7):
    class Layout:
        pass

    layout = Layout()
    layout.length = length
    rows = torch.tensor([[0], [0]])
    return AttentionContext(0, None, layout, rows, False, {}, num_cached=4, prompt_length=prompt_length, index=index)


def test_values_travel_between_keys_and_prompt_positions():
    index = torch.tensor([[-1, 0, 4, 6], [0, 2, 5, 6]])
    here = context(index)
    values = torch.arange(1.0, 11.0).view(2, 5)
    there = here.globalize(values, fill=-7)
    assert there.tolist() == [[2, -7, -7, -7, 3, -7, 4], [6, -7, 7, -7, -7, 8, 9]]
    back = here.localize(there, fill=-1)
    expected = torch.where(pad(index, (0, 1), value=-1) < 0, -1, values)
    assert torch.equal(back, expected)
    assert torch.equal(here.globalize(values[:, None, None].expand(-1, 3, 2, -1))[:, 1, 1], here.globalize(values))
    assert here.positions.tolist() == [[4], [4]]


def test_without_a_reduction_only_the_answer_is_left_out():
    values = torch.arange(10.0).view(2, 5)
    assert torch.equal(context(prompt_length=4).globalize(values), values[:, :4])
