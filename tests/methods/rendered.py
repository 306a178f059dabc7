"""Holds methods that compute less against their naive rendering."""

from __future__ import annotations

from typing import Any

import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from tests.methods.dense import STEPS, answer
from tests.reference.attention import full_logits
from tests.reference.compute import Prompts, rendered
from tests.zoo import IMAGE, VIDEO, Zoo

__all__ = ["SEVERAL", "TOLERANCE", "equals_rendering", "prompts_of", "same_bits"]

#: float32 through a few layers, query by query against fused kernels; largest difference seen is 4e-6.
TOLERANCE = 1e-5
SEVERAL = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"]


def prompts_of(zoo: Zoo, inputs: dict[str, Any]) -> Prompts:
    """The prompts as the rendering sees them; cells as the layout knows them, which has tests of its own."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "reduction-identity"):
        zoo.model(**inputs)
        layout = find_runtime(zoo.model).last.layout
    cells = {}
    for span in layout.spans:
        places = zip(span.tokens.crop.tolist(), span.tokens.row.tolist(), span.tokens.col.tolist(), strict=True)
        for column, place in zip(span.positions.tolist(), places, strict=True):
            cells[span.sample, column] = (span.image, *place)
    return Prompts(inputs["input_ids"], (IMAGE, VIDEO), cells)


def equals_rendering(zoo: Zoo, inputs: dict[str, Any], methods: Any, prompts: Prompts, **rendering: Any) -> None:
    """Logits of every position of the prompt and of the steps that follow are those of `rendered`."""
    methods = methods if isinstance(methods, list) else [methods]
    tokens, steps = answer(zoo, inputs, *methods)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, *methods):
        prefill = zoo.model(**inputs).logits
    plain = full_logits(zoo.model, inputs, tokens[:, :-1])[:, -STEPS:]
    with rendered(zoo.model, prompts, **rendering):
        expected = full_logits(zoo.model, inputs, tokens[:, :-1])
        alone = full_logits(zoo.model, inputs)
    assert (expected[:, -STEPS:] - plain).abs().amax(dim=2).min() > 1e-3, "what changes nothing proves nothing"
    torch.testing.assert_close(steps, expected[:, -STEPS:], atol=TOLERANCE, rtol=0)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(prefill[valid], alone[valid], atol=TOLERANCE, rtol=0)


def same_bits(zoo: Zoo, method: Any, **kwargs: Any) -> None:
    """A method changes no bit, neither of a prompt nor of its answer."""
    inputs = zoo.inputs(batch=2, **kwargs)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        tokens, steps = answer(zoo, inputs, "attention-identity")
        with lmmhooks.wrap(zoo.model, method):
            assert torch.equal(zoo.model(**inputs).logits, plain)
        patched, logits = answer(zoo, inputs, method)
    assert torch.equal(patched, tokens)
    assert torch.equal(logits, steps)
