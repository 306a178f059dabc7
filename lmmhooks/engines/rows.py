"""Exact attention for a few query rows: selection, scores, visibility, received attention; pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowPlan", "apply_weights", "plan_rows", "received_attention", "row_scores", "visible", "visible_keys"]

MASKED = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class RowPlan:
    """
    Query rows that are computed explicitly in one attention call.

    Attributes
    ----------
    index
        ``[B, R]`` row numbers among the queries of the call; where a sample has fewer rows, the filler entries
        are rows of it that were not selected; no row stands twice.
    real
        ``[B, R]`` bool, False for filler entries.
    members
        For every named selection that went into the plan, ``[B, R]`` bool: which planned rows belong to it.
    covers_all
        Every query of the call is planned, in order, so that the fused call can be skipped.
    """

    index: Tensor
    real: Tensor
    members: dict[str, Tensor]
    covers_all: bool

    @property
    def num_rows(self) -> int:
        return int(self.index.shape[1])


def plan_rows(selections: dict[str, Tensor]) -> RowPlan | None:
    """
    Union of named row selections as one padded index.

    Parameters
    ----------
    selections
        Name to ``[B, Nq]`` bool.

    Returns
    -------
    RowPlan or None
        None when no row is selected in any sample. Costs one host synchronisation; plans are kept per prompt.
    """
    union = torch.stack(list(selections.values())).any(dim=0)
    counts = union.sum(dim=1)
    most, least = (int(value) for value in torch.stack([counts.max(), counts.min()]).tolist())
    if most == 0:
        return None
    # Stable sort keeps selected rows in order and puts them first.
    index = torch.sort(union.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :most]
    real = torch.arange(most, device=union.device)[None] < counts[:, None]
    members = {name: mask.gather(1, index) & real for name, mask in selections.items()}
    return RowPlan(index, real, members, covers_all=least == union.shape[1])


def all_rows(names: list[str], batch: int, num_queries: int, device: torch.device) -> RowPlan:
    """The plan that covers every query: decode steps and short continuations."""
    index = torch.arange(num_queries, device=device).expand(batch, -1)
    real = torch.ones_like(index, dtype=torch.bool)
    return RowPlan(index, real, dict.fromkeys(names, real), covers_all=True)


def take_rows(states: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, R]`` of ``states [B, H, N, d]`` as ``[B, H, R, d]``."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def row_scores(queries: Tensor, keys: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """
    Scaled logits of some rows, in float32, with grouped keys read in place.

    Parameters
    ----------
    queries
        ``[B, H, R, d]``.
    keys
        ``[B, Hkv, N, d]``, ``H`` a multiple of ``Hkv``.
    scaling
        Factor on the dot products.
    softcap
        Bound c of decoders that squash logits to ``c tanh(logit / c)``; None for the others.

    Returns
    -------
    Tensor
        ``[B, H, R, N]``.
    """
    batch, heads, rows, width = queries.shape
    groups = heads // keys.shape[1]
    # Folding the group into the rows spares the H x N copy of the keys that repeat_kv makes.
    folded = queries.reshape(batch, keys.shape[1], groups * rows, width)
    scores = torch.matmul(folded, keys.transpose(2, 3)) * scaling
    scores = scores.view(batch, heads, rows, keys.shape[2]).float()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def apply_weights(weights: Tensor, values: Tensor) -> Tensor:
    """Weights ``[B, H, R, N]`` times values ``[B, Hkv, N, d]``: ``[B, H, R, d]`` in the dtype of the values."""
    batch, heads, rows, length = weights.shape
    groups = heads // values.shape[1]
    folded = weights.to(values.dtype).reshape(batch, values.shape[1], groups * rows, length)
    return torch.matmul(folded, values).view(batch, heads, rows, values.shape[3])


def visible(
    mask: Tensor | None, index: Tensor, num_queries: int, num_keys: int, valid: Tensor | None, causal: bool
) -> Tensor | None:
    """
    What the planned rows may see.

    Parameters
    ----------
    mask
        The mask the attention call received: ``[B or 1, 1 or H, Nq, >= N]`` bool (True = visible) or additive float, or
        None. Backends that express padding in another way (2-D, block mask) pass None here and ``valid``.
    index
        ``[B, R]`` planned rows.
    num_queries, num_keys
        Lengths of the call. Query i sees key j when ``j <= i + num_keys - num_queries``.
    valid
        ``[B, N]`` bool of keys that are no padding; used only when ``mask`` is None; None when nothing is padded.
    causal
        Whether rows see only earlier keys (decoders) or all of them (vision towers).

    Returns
    -------
    Tensor or None
        ``[B, 1 or H, R, N]``, bool or additive float like the input; None when everything is visible.
    """
    if mask is not None:
        mask = mask[..., :num_keys].expand(index.shape[0], -1, -1, -1)
        rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, num_keys)
        return mask.gather(2, rows)
    allowed: Tensor | None = None
    if causal and num_queries > 1:
        last = index[:, None, :, None] + (num_keys - num_queries)
        allowed = torch.arange(num_keys, device=index.device) <= last
    if valid is not None:
        keys = valid[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    return allowed


def visible_keys(mask: Tensor | None, keys: Tensor, num_queries: int, num_keys: int, valid: Tensor | None) -> Tensor:
    """
    Which rows of a decoder see some of the keys: columns of what `visible` gives, without the other columns.

    Parameters
    ----------
    mask, num_queries, num_keys, valid
        As for `visible`; the mask must be the same for all heads.
    keys
        ``[B, H, S]`` long, other keys for every head.

    Returns
    -------
    Tensor
        ``[B, H, Nq, S]`` bool.
    """
    if mask is not None:
        dense = mask[:, :1, :, :num_keys].expand(keys.shape[0], keys.shape[1], -1, -1)
        picked = dense.gather(3, keys[:, :, None, :].expand(-1, -1, num_queries, -1))
        return picked if picked.dtype == torch.bool else picked > torch.finfo(picked.dtype).min / 2
    last = torch.arange(num_queries, device=keys.device)[:, None] + (num_keys - num_queries)
    seen = keys[:, :, None, :] <= last
    if valid is not None:
        seen = seen & valid[:, None].expand(-1, keys.shape[1], -1).gather(2, keys)[:, :, None, :]
    return seen


def hide(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Scores with invisible keys at the smallest float32; in place on ``scores``."""
    if allowed is None:
        return scores
    if allowed.dtype == torch.bool:
        # The smallest number, not -inf: a padded row that sees nothing must not turn into NaN.
        return scores.masked_fill_(~allowed, MASKED)
    return scores.add_(allowed.float()).clamp_(min=MASKED)


def received_attention(queries: Tensor, keys: Tensor, scaling: float, block: int = 256) -> Tensor:
    """
    Mean attention every key receives from all queries, without the full matrix.

    Parameters
    ----------
    queries
        ``[B, H, N, d]``; all rows see all keys (vision towers).
    keys
        ``[B, Hkv, N, d]``.
    block
        Query rows held at once; memory is ``B x H x block x N`` float32.

    Returns
    -------
    Tensor
        ``[B, H, N]`` float32; sums to 1 over N.
    """
    total = queries.new_zeros(queries.shape[0], queries.shape[1], keys.shape[2], dtype=torch.float32)
    for start in range(0, queries.shape[2], block):
        rows = queries[:, :, start : start + block]
        total += torch.softmax(row_scores(rows, keys, scaling), dim=-1).sum(dim=2)
    return total / queries.shape[2]
