"""Choosing by score, shared by methods: deterministic on every device."""

from __future__ import annotations

from torch import Tensor

__all__ = ["top_ascending"]


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
