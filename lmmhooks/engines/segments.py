"""A small set of keys reweighted against all others without the attention matrix; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmmhooks.engines.rows import hide, row_scores

if TYPE_CHECKING:
    from lmmhooks.engines.backend import AttentionCall

__all__ = ["read_received", "reweight"]

COLUMN_BLOCK = 256
"""Query rows of which weights exist at once; memory is B x H' x block x N float32."""

Visible = Callable[[Tensor], Tensor | None]
"""Rows ``[B, R]`` to what they may see, as `lmmhooks.engines.rows.visible` returns it."""


def read_received(
    call: AttentionCall, keys: Tensor, heads: Sequence[int] | None, allowed: Visible, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """
    How much attention every key receives from the rows that can see it.

    Parameters
    ----------
    call
        A call that reads a prompt: as many queries as keys.
    keys
        ``[B, Hkv, N, d]``.
    heads
        Query heads to look at; None for all.
    allowed
        What rows may see.
    valid
        ``[B, N]`` bool, False for padding.

    Returns
    -------
    tuple
        Mean weights ``[B, H', N]`` float32; the number of rows that see a key, ``[B, N]`` long; and the log of the
        softmax denominators ``[B, H', N]`` of the rows.
    """
    queries, keys = _of_heads(call.query, keys, heads)
    batch, num_heads, length, _ = queries.shape
    total = torch.zeros(batch, num_heads, length, device=queries.device)
    seen = torch.zeros(batch, length, dtype=torch.long, device=queries.device)
    denominators = []
    rows = torch.arange(length, device=queries.device).expand(batch, -1)
    for start in range(0, length, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, length)
        block = rows[:, start:stop]
        scores = row_scores(queries[:, :, start:stop], keys, call.scaling, call.kwargs.get("softcap"))
        may = allowed(block)
        scores = hide(scores, may)
        lse = scores.logsumexp(dim=-1)
        denominators.append(lse)
        real = valid[:, start:stop]
        weights = scores.sub_(lse[..., None]).exp_()
        total += torch.matmul(real[:, None, None, :].to(weights.dtype), weights)[:, :, 0]
        seen += (_as_bool(may, batch, block.shape[1], length, queries.device) & real[..., None]).sum(dim=1)
    seen = seen * valid
    return total / seen[:, None].clamp(min=1), seen, torch.cat(denominators, dim=-1)


def reweight(
    output: Tensor,
    call: AttentionCall,
    keys: Tensor,
    values: Tensor,
    heads: Sequence[int] | None,
    chosen: Tensor,
    lse: Tensor,
    allowed: Visible,
    factors: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """
    ``outside * O + (inside - outside) * m * O_S`` for every row.

    Parameters
    ----------
    output
        ``[B, N, H, d]`` of the unedited call.
    call, keys, values
        What it was made from.
    heads
        Edited query heads, H' of them; None for all.
    chosen
        ``[B, H', N]`` bool: the set S of each head.
    lse
        ``[B, H', N]`` from `read_received`.
    allowed
        What rows may see.
    factors
        Mass on the set to the weights of set and rest.

    Returns
    -------
    tuple
        The edited output, and the attention mass that moved, ``[B, N]``, mean over all heads.
    """
    most = int(chosen.sum(dim=-1).max())
    if most == 0:
        return output, torch.zeros(output.shape[:2], device=output.device)
    queries, keys = _of_heads(call.query, keys, heads)
    _, values = _of_heads(call.query, values, heads)
    # Chosen keys first, in order; heads with fewer are filled up with keys that the mask below takes out again.
    index = torch.sort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True).indices[..., :most]
    real = chosen.gather(-1, index)
    picked_keys, picked_values = (
        states.gather(2, index[..., None].expand(-1, -1, -1, states.shape[-1])) for states in (keys, values)
    )
    weights = row_scores(queries, picked_keys, call.scaling, call.kwargs.get("softcap"))
    weights = weights.sub_(lse[..., None]).exp_()
    batch, _, length, _ = queries.shape
    rows = torch.arange(length, device=queries.device).expand(batch, -1)
    may = _as_bool(allowed(rows), batch, length, length, queries.device)
    seen = may[:, None].expand(-1, index.shape[1], -1, -1).gather(3, index[:, :, None].expand(-1, -1, length, -1))
    # Rows of padding have a denominator of nothing; filling, not multiplying, keeps their infinities out.
    weights = weights.masked_fill_(~(seen & real[:, :, None]), 0)
    mass = weights.sum(dim=-1)
    inside, outside = (factor.expand_as(mass) for factor in factors(mass))
    # In float32 until the end: the two terms nearly cancel where the set holds almost all of the mass.
    partial = torch.matmul(weights, picked_values.float())
    plain = output.transpose(1, 2) if heads is None else output.transpose(1, 2)[:, list(heads)]
    edited = outside[..., None] * plain.float() + (inside - outside)[..., None] * partial
    moved = 0.5 * ((inside - 1).abs() * mass + (outside - 1).abs() * (1 - mass)).sum(dim=1) / output.shape[2]
    if heads is None:
        return edited.transpose(1, 2).to(output.dtype), moved
    result = output.clone()
    result[:, :, list(heads)] = edited.transpose(1, 2).to(output.dtype)
    return result, moved


def _of_heads(queries: Tensor, states: Tensor, heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Queries of some heads and the key or value states each of them reads, ``[B, H', N, d]`` both."""
    groups = queries.shape[1] // states.shape[1]
    if heads is None:
        return queries, states if groups == 1 else states.repeat_interleave(groups, dim=1)
    index = torch.tensor(list(heads), device=queries.device)
    return queries[:, index], states[:, index // groups]


def _as_bool(allowed: Tensor | None, batch: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """``[B, R, N]`` bool from what `visible` returns; the mask must be the same for all heads."""
    if allowed is None:
        return torch.ones(batch, rows, keys, dtype=torch.bool, device=device)
    seen = allowed if allowed.dtype == torch.bool else allowed > torch.finfo(allowed.dtype).min / 2
    return seen[:, 0].expand(batch, -1, -1)
