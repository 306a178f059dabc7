"""Holds attention methods against full attention matrices."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

import lmmhooks
from tests.reference.attention import Edit, dense_attention, full_logits
from tests.zoo import Zoo

__all__ = ["STEPS", "TOLERANCE", "answer", "continues_alike", "equals_dense"]

#: float32 through a few layers in another summation order; largest difference seen is 3e-6.
TOLERANCE = 1e-5
#: Prefill and two decode steps.
STEPS = 3


def answer(zoo: Zoo, inputs: dict[str, Any], *methods: Any, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens ``[B, steps]`` and their logits ``[B, steps, vocabulary]`` under some methods."""
    with lmmhooks.wrap(zoo.model, *methods):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def equals_dense(
    zoo: Zoo, inputs: dict[str, Any], methods: Any, changes: tuple[int, ...] | None = None, **edits: Edit
) -> None:
    """
    Prefill and decode logits under some methods are those of their naive rendering.

    Parameters
    ----------
    methods
        One, or a list.
    changes
        Rows of the batch that must differ from the plain model at every step; None: all.
    edits
        Of `dense_attention`.
    """
    tokens, logits = answer(zoo, inputs, *(methods if isinstance(methods, list) else [methods]))
    plain = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -STEPS:]
    with dense_attention(zoo.model, **edits):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -STEPS:]
    touched = list(range(len(plain)) if changes is None else changes)
    assert (expected - plain)[touched].abs().amax(dim=2).min() > 1e-3, "an edit that changes nothing proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def continues_alike(zoo: Zoo, *methods: Any) -> None:
    """Several tokens that continue a prompt in one forward have the logits of one forward each."""
    inputs = zoo.inputs(batch=1)
    tokens = torch.tensor([[20, 30, 40]])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, *methods):
        together, single = DynamicCache(), DynamicCache()
        for cache in (together, single):
            zoo.model(**inputs, past_key_values=cache)
        at_once = zoo.model(input_ids=tokens, past_key_values=together).logits
        steps = [zoo.model(input_ids=tokens[:, i : i + 1], past_key_values=single).logits for i in range(3)]
    torch.testing.assert_close(at_once, torch.cat(steps, dim=1), atol=TOLERANCE, rtol=0)
