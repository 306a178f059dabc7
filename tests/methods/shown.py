"""Comparison of decoding methods that show something else in an image's place with their naive renderings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lmmhooks
from tests.reference.branch_features import NaiveRows, naive_tokens
from tests.zoo import END, IMAGE, START, VIDEO, Zoo, build

# float32 through four layers, batched against single rows, times weights that reach 5; largest difference seen: 2e-5.
TOLERANCE = 5e-5
STEPS = 4
#: With and without class token, tiles, windows, deepstack, and several patches to a token.
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
#: A rendering without cache could not tell an answer that says "image" from one.
SILENT = [IMAGE, VIDEO, START, END]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}

#: (model with eager attention, inputs) -> the naive rendering.
Render = Callable[[Zoo, dict[str, Tensor]], NaiveRows]


def inputs_of(zoo: Zoo) -> dict[str, Tensor]:
    """Two rows, padded on the left, two images in the first."""
    return zoo.inputs(batch=2, images=[2, 1])


@torch.no_grad()
def check_logits(family: str, method: Any, render: Render, *, seen: float = 1e-2) -> None:
    """Logits of the prompt and every step; what the branch shows must move the logits by ``seen`` at least."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = inputs_of(zoo)
    plain = zoo.model(**inputs).logits[:, -1]
    with lmmhooks.wrap(zoo.model, method):
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=SILENT,
        )  # fmt: skip
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    naive = render(eager, inputs)
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, naive.logits(answer[:, :step]), atol=TOLERANCE, rtol=0)
    kept = out.logits[0].isfinite()
    moved = (out.logits[0] - plain)[kept]
    assert (moved - moved.mean()).abs().max() > seen, "a branch that changes nothing proves nothing"


@torch.no_grad()
def check_tokens(family: str, method: Any, render: Render, mode: str) -> None:
    """Token for token in a loop of ``generate``, random numbers shared."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = inputs_of(zoo)
    arguments = {"max_new_tokens": STEPS, "suppress_tokens": SILENT, **MODES[mode]}
    torch.manual_seed(0)
    expected = naive_tokens(render(eager, inputs), **arguments)
    with lmmhooks.wrap(zoo.model, method):
        torch.manual_seed(0)
        out = zoo.model.generate(**inputs, **arguments)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)
