"""
The timed computations: a prefill cut at the decoder, decode steps, a native run of the decoder, naive two passes.

Spans are taken at module boundaries by hooks that exist only while a pass runs. The decoder's span begins before
anything a patch does there and ends after it, at the language head.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmmhooks.bench.prompts import Prompt
from lmmhooks.bench.timing import synchronizer
from lmmhooks.family import Family

__all__ = ["Pass", "native_decoder_pass", "timed_pass", "two_pass_step"]


@dataclass(frozen=True)
class Pass:
    """
    Times of one prompt, in milliseconds.

    Attributes
    ----------
    vision
        From the start of the forward to the decoder: tower, projector, embedding, and what a patch does there.
    decoder
        From the decoder's start to the language head.
    prefill
        The whole forward of the prompt.
    decode
        Median of the decode steps; 0 when there were none.
    """

    vision: float
    decoder: float
    prefill: float
    decode: float


@contextmanager
def _marks(family: Family, mark: Callable[[str], None]) -> Iterator[None]:
    def before(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: mark(name)

    handles = [
        family.text_model.register_forward_pre_hook(before("decoder"), prepend=True),
        family.lm_head.register_forward_pre_hook(before("head"), prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def timed_pass(family: Family, prompt: Prompt, decode_tokens: int = 0) -> Pass:
    """
    Prefill a prompt and decode greedily, by plain forward calls.

    Parameters
    ----------
    family
        The model, patched or not.
    prompt
        Its inputs.
    decode_tokens
        Decode steps after the prefill.

    Returns
    -------
    Pass
    """
    synchronize = synchronizer(family.model.device)
    at: dict[str, float] = {}

    def mark(name: str) -> None:
        synchronize()
        at[name] = time.perf_counter()

    # As `generate` does: an attention mask without padding is not passed on.
    inputs = {name: value for name, value in prompt.inputs.items() if name != "attention_mask"}
    with _marks(family, mark):
        mark("start")
        out = family.model(**inputs, use_cache=True, logits_to_keep=1)
        mark("end")
    steps = []
    for _ in range(decode_tokens):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        synchronize()
        begin = time.perf_counter()
        out = family.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        synchronize()
        steps.append(1e3 * (time.perf_counter() - begin))
    return Pass(
        vision=1e3 * (at["decoder"] - at["start"]),
        decoder=1e3 * (at["head"] - at["decoder"]),
        prefill=1e3 * (at["end"] - at["start"]),
        decode=statistics.median(steps) if steps else 0.0,
    )


@torch.no_grad()
def native_decoder_pass(family: Family, batch: int, tokens: int) -> float:
    """
    Time the unpatched decoder on a prompt that is short to begin with: the limit of every reduction.

    Parameters
    ----------
    family
        The model, without an active patch.
    batch, tokens
        Prompts and their length.

    Returns
    -------
    float
        Milliseconds.
    """
    weight = next(family.text_model.parameters())
    embeds = torch.randn(batch, tokens, family.hidden_size, dtype=weight.dtype, device=weight.device)
    synchronize = synchronizer(weight.device)
    synchronize()
    begin = time.perf_counter()
    family.text_model(inputs_embeds=embeds, use_cache=True)
    synchronize()
    return 1e3 * (time.perf_counter() - begin)


@torch.no_grad()
def two_pass_step(family: Family, prompt: Prompt, decode_tokens: int) -> float:
    """
    Time the naive form of two-branch decoding: two caches and two forwards per step.

    Parameters
    ----------
    family
        The model, without an active patch.
    prompt
        Its inputs, used for both branches (their content does not change the time).
    decode_tokens
        Decode steps.

    Returns
    -------
    float
        Median milliseconds per step.
    """
    synchronize = synchronizer(family.model.device)
    inputs = {name: value for name, value in prompt.inputs.items() if name != "attention_mask"}
    branches = [family.model(**inputs, use_cache=True, logits_to_keep=1) for _ in range(2)]
    steps = []
    for _ in range(decode_tokens):
        mixed = 2 * branches[0].logits[:, -1] - branches[1].logits[:, -1]
        token = mixed.argmax(-1, keepdim=True)
        synchronize()
        begin = time.perf_counter()
        branches = [
            family.model(input_ids=token, past_key_values=branch.past_key_values, use_cache=True, logits_to_keep=1)
            for branch in branches
        ]
        synchronize()
        steps.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(steps)
