"""Choosing by score, shared by methods: deterministic on every device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ascending_indices", "ranks", "top_ascending"]


def top_ascending(scores: Tensor, num_keep: int) -> Tensor:
    """
    Indices of the largest scores, in ascending order; the lower index wins a tie.

    Parameters
    ----------
    scores
        ``[G, V]``, finite.
    num_keep
        K, at most V.

    Returns
    -------
    Tensor
        ``[G, K]`` long.
    """
    # topk breaks ties differently on every device, and half-precision scores do tie; a stable sort does not.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_keep]
    return best.sort(dim=-1).values


def ranks(scores: Tensor) -> Tensor:
    """Place of every score among those of its row, ``[G, V]`` long: 0 is the largest, the lower index wins a tie."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def ascending_indices(kept: Tensor, num_columns: int) -> Tensor:
    """Indices of the True entries of ``[G, V]``, ascending, as ``[G, num_columns]`` long; -1 fills what is left."""
    num_tokens = kept.shape[-1]
    place = torch.arange(num_tokens, device=kept.device)
    index = torch.where(kept, place, num_tokens).sort(dim=-1).values[:, :num_columns]
    return index.masked_fill(index == num_tokens, -1)
