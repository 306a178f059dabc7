"""
What the branches of a decoding method read, and what that costs at least and at most.

At least: the prompt of the main rows, and of every branch what it does not have in common with them. At most: the naive
loop, in which every branch has a forward and a cache of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from lmmhooks.bench.prompts import Prompt
from lmmhooks.bench.timing import synchronizer
from lmmhooks.family import Family
from lmmhooks.methods.decoding.base import DecodingMethod

__all__ = ["Reading", "naive_loop", "read_branches", "suffix_pass"]


@dataclass(frozen=True, eq=False)
class Reading:
    """
    The prompt of one branch as it enters the decoder.

    Attributes
    ----------
    embeds
        ``[B, n, D]``, without padding.
    shared
        Leading positions that are those of the main rows.
    layers
        Share of the decoder layers in which the rest is another than that of the main rows.
    """

    embeds: Tensor
    shared: int = 0
    layers: float = 1.0


@torch.no_grad()
def read_branches(family: Family, method: DecodingMethod, prompt: Prompt) -> list[Reading]:
    """
    Run a prompt once and note what every branch reads.

    Parameters
    ----------
    family
        A model that is wrapped with the method.
    method
        One with branches.
    prompt
        Equally long prompts.

    Returns
    -------
    list of Reading
        The main branch first.
    """
    calls: list[tuple[Tensor, Tensor | None]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((kwargs["inputs_embeds"], kwargs.get("attention_mask")))

    handle = family.text_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        # Without a cache nothing is taken over from other rows: every branch hands over its whole prompt.
        family.model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    # Branches that read after the main rows come in the last call, the main rows in the first; else all in the last.
    blocks = _blocks(*calls[-1], prompt.batch)
    if len(blocks) == len(method.branches(family)):
        blocks = [*_blocks(*calls[0], prompt.batch), *blocks]
    main, *others = blocks
    return [Reading(main), *(_compare(family, method, prompt, main, other) for other in others)]


def _blocks(embeds: Tensor, mask: Tensor | None, batch: int) -> list[Tensor]:
    """Rows of every branch in one forward of the decoder, without the padding on their left."""
    if mask is None:
        return list(embeds.split(batch))
    lengths = mask.sum(dim=1)[::batch].tolist()
    return [rows[:, -length:] for rows, length in zip(embeds.split(batch), lengths, strict=True)]


def _compare(family: Family, method: DecodingMethod, prompt: Prompt, main: Tensor, other: Tensor) -> Reading:
    num = min(main.shape[1], other.shape[1])
    same = (main[:, :num] == other[:, :num]).all(dim=-1).all(dim=0)
    shared = int(same.long().cumprod(dim=0).sum())
    edited = list(method.branch_layers(family))
    if shared == other.shape[1] and edited:
        # The same prompt, attended to in another way from some layer on: at visual tokens and behind them.
        before = int((prompt.inputs["input_ids"][0] == family.image_token_id).long().argmax())
        return Reading(other, before, 1 - min(edited) / family.num_layers)
    return Reading(other, min(shared, other.shape[1] - 1))


@torch.no_grad()
def suffix_pass(family: Family, readings: Sequence[Reading]) -> float:
    """
    Time the least that branches have to read: what each of them does not share with the main rows.

    Parameters
    ----------
    family
        The model, without an active patch.
    readings
        Of `read_branches`.

    Returns
    -------
    float
        Milliseconds in the decoder: the prompt of the main rows, and then every suffix, behind a cache that holds what
        comes before it.
    """
    synchronize = synchronizer(family.model.device)

    def timed(embeds: Tensor, cache: Cache) -> float:
        synchronize()
        begin = time.perf_counter()
        family.text_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        synchronize()
        return 1e3 * (time.perf_counter() - begin)

    main, *others = readings
    whole = DynamicCache(config=family.text_config)
    total = timed(main.embeds, whole)
    for branch in others:
        prefix = DynamicCache(config=family.text_config)
        if branch.shared:
            for index, layer in enumerate(whole.layers):
                prefix.update(layer.keys[:, :, : branch.shared], layer.values[:, :, : branch.shared], index)
        total += branch.layers * timed(branch.embeds[:, branch.shared :], prefix)
    return total


@torch.no_grad()
def naive_loop(family: Family, readings: Sequence[Reading], decode_tokens: int) -> Callable[[], float]:
    """
    Prepare the naive form of decoding with branches: a cache and a forward per step for each, one after the other.

    Parameters
    ----------
    family
        The model, without an active patch now and whenever the loop runs.
    readings
        Of `read_branches`.
    decode_tokens
        Steps per run, 1 or more.

    Returns
    -------
    callable
        Decodes greedily from the prompts' end and gives the median milliseconds per step, the combination of the
        logits included; may be called again.
    """
    synchronize = synchronizer(family.model.device)
    embed = family.model.get_input_embeddings()
    caches = [DynamicCache(config=family.text_config) for _ in readings]

    def step(inputs: Sequence[Tensor]) -> Tensor:
        logits = [
            family.lm_head(family.text_model(inputs_embeds=rows, past_key_values=cache, use_cache=True)[0][:, -1:])
            for rows, cache in zip(inputs, caches, strict=True)
        ]
        mixed = len(logits) * logits[0].float()
        for other in logits[1:]:
            mixed = mixed - other.float()
        return mixed.argmax(dim=-1)

    first = step([reading.embeds for reading in readings])

    @torch.no_grad()
    def run() -> float:
        token, times = first, []
        for _ in range(decode_tokens):
            synchronize()
            begin = time.perf_counter()
            token = step([embed(token)] * len(caches))
            synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        for cache in caches:
            cache.crop(-decode_tokens)
        return statistics.median(times)

    return run
