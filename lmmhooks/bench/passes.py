"""
The timed computations: a prefill cut at the decoder, decode steps, a beam search, a native run of the decoder.

Spans are taken at module boundaries by hooks that exist only while a pass runs. The decoder's span begins before
anything a patch does there and ends after it, at the language head; a patch that reads a prompt in several forwards has
all of them in it.
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
from transformers import StoppingCriteriaList

from lmmhooks.bench.prompts import Prompt
from lmmhooks.bench.timing import synchronizer
from lmmhooks.family import Family
from lmmhooks.metering import TokenClock

__all__ = ["Pass", "native_decoder_pass", "searched_pass", "timed_pass"]


@dataclass(frozen=True)
class Pass:
    """
    Times of one prompt, in milliseconds.

    Attributes
    ----------
    vision
        From the start of the forward to the decoder: tower, projector, embedding, and what a patch does there.
    decoder
        From the decoder's first start to the last call of the language head.
    prefill
        The whole forward of the prompt.
    decode
        Median of the decode steps, or the mean of a beam search; 0 when there were none.
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
        now = time.perf_counter()
        at[name] = at.get(name, now) if name == "decoder" else now

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


def searched_pass(family: Family, prompt: Prompt, num_beams: int, new_tokens: int) -> Pass:
    """
    Answer a prompt by the beam search of ``generate``, patched or not.

    Parameters
    ----------
    family
        The model, patched or not.
    prompt
        Its inputs.
    num_beams
        Beams, 2 or more.
    new_tokens
        Length of every answer, 1 or more.

    Returns
    -------
    Pass
        ``prefill``: up to the choice of the first tokens. ``decode``: per token from there on, choice included. Vision
        and decoder are not told apart.
    """
    clock = TokenClock(family.model.device)
    family.model.generate(
        **prompt.inputs,
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    clock.finish()
    return Pass(0.0, 0.0, clock.prefill_ms, (clock.decode_ms or 0.0) / max(clock.steps - 1, 1))


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
