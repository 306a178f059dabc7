"""Moving the tensors of a batch of sequences to fewer positions and back; pure functions, any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gather_deepstack", "gather_last", "gather_rotary", "gather_states", "put_back", "renumbered"]


def gather_states(states: Tensor, index: Tensor) -> Tensor:
    """
    States ``[B, N, D]`` at ``index [B, N2]`` as ``[B, N2, D]``.

    Padding (-1) receives the state of position 0: something finite that the mask hides.
    """
    index = index.to(states.device).clamp(min=0)
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def gather_last(values: Tensor, index: Tensor) -> Tensor:
    """Values ``[..., B or 1, N]`` at ``index [B, N2]`` as ``[..., B, N2]``; padding receives 0."""
    index = index.to(values.device)
    values = values.expand(*values.shape[:-2], index.shape[0], -1)
    picked = values.gather(-1, index.clamp(min=0).expand(*values.shape[:-1], -1))
    return picked.masked_fill(index < 0, 0)


def gather_rotary(angles: Tensor, index: Tensor) -> Tensor:
    """Cosines or sines ``[..., B or 1, N, d]`` at ``index [B, N2]`` as ``[..., B, N2, d]``."""
    index = index.to(angles.device).clamp(min=0)
    angles = angles.expand(*angles.shape[:-3], index.shape[0], -1, -1)
    return angles.gather(-2, index[..., None].expand(*angles.shape[:-3], -1, -1, angles.shape[-1]))


def renumbered(index: Tensor) -> Tensor:
    """Positions 0, 1, 2 ... of the entries of ``index [B, N2]`` that are no padding; padding is at 0."""
    return ((index >= 0).cumsum(dim=1) - 1).clamp(min=0)


def gather_deepstack(mask: Tensor, features: list[Tensor], index: Tensor) -> tuple[Tensor, list[Tensor]]:
    """
    Deepstack features of the visual tokens that stay.

    Parameters
    ----------
    mask
        Bool ``[B, N]``: visual positions.
    features
        Per decoder layer ``[visual tokens of all rows, D]``, in the order of ``mask``.
    index
        Long ``[B, N2]``, -1 for padding.

    Returns
    -------
    tuple
        The same for the new sequence.
    """
    index = index.to(mask.device)
    at = index.clamp(min=0)
    rank = mask.flatten().cumsum(dim=0).view_as(mask) - 1
    new_mask = mask.gather(1, at) & (index >= 0)
    rows = rank.gather(1, at)[new_mask]
    return new_mask, [feature[rows.to(feature.device)] for feature in features]


def put_back(before: Tensor, after: Tensor, inverse: Tensor) -> Tensor:
    """
    The long sequence again: survivors as they are now, the others as they were when they left.

    Parameters
    ----------
    before
        ``[B, N, D]`` as it was at the cut.
    after
        ``[B, N2, D]``.
    inverse
        Long ``[B, N]``: column in ``after``, -1 for what left.
    """
    inverse = inverse.to(after.device)
    return torch.where((inverse >= 0)[..., None], gather_states(after, inverse), before.to(after.device))
