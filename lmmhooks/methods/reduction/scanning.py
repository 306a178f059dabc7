"""A local and a global scan of a crop for salient tokens, and merging of the others (VScan)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_into_nearest", "scan", "windows_of"]


def windows_of(row: Tensor, col: Tensor, size: int) -> Tensor:
    """
    Windows of a crop.

    Parameters
    ----------
    row, col
        ``[V]`` cells, -1 where unknown.
    size
        Side of a window in tokens; those at the right and lower border may be smaller. Tokens without cells are grouped
        by ``size * size`` in the order they come.

    Returns
    -------
    Tensor
        Long ``[W, S]``: tokens of every window in raster order, windows in raster order, shorter ones filled with -1.
    """
    if bool((row < 0).any()):
        window = torch.arange(len(row)) // size**2
    else:
        window = row // size * (int(col.max()) // size + 1) + col // size
    members = [(window == number).nonzero().flatten() for number in window.unique().tolist()]
    return torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)


def scan(early: Tensor, late: Tensor, windows: Tensor, num_keep: int, exact: bool) -> Tensor:
    """
    Half of the tokens by early attention, equally many of every window, the others by late attention.

    Parameters
    ----------
    early, late
        ``[G, V]`` attention in both layers.
    windows
        As `windows_of` returns them.
    num_keep
        K.
    exact
        Whether the global scan takes what does not divide among the windows.

    Returns
    -------
    Tensor
        ``[G, K']`` long, ascending; K' is below K by what was lost.
    """
    num_local = int(num_keep * 0.5)
    each = min(num_local // windows.shape[0], windows.shape[1])
    is_filler = (windows < 0).to(early.device)
    places = windows.clamp(min=0).to(early.device)
    inside = early[:, places].masked_fill(is_filler, -torch.inf)
    best = inside.sort(dim=-1, descending=True, stable=True).indices[..., :each]
    local = places.expand(len(early), -1, -1).gather(2, best)
    real = ~is_filler.expand(len(early), -1, -1).gather(2, best)
    chosen = torch.zeros_like(early).scatter_add(1, local.flatten(1), real.flatten(1).to(early.dtype)) > 0
    # Windows are the same in all groups, so their tokens can be counted without the device.
    found = sum(min(each, size) for size in (windows >= 0).sum(dim=1).tolist())
    num_global = num_keep - (found if exact else num_local)
    rest = late.masked_fill(chosen, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :num_global]
    chosen = chosen.scatter(1, rest, True)
    return chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : found + num_global]


def merge_into_nearest(states: Tensor, index: Tensor) -> Tensor:
    """
    Kept tokens averaged with the dropped ones that are most similar to them.

    Parameters
    ----------
    states
        ``[G, V, D]``.
    index
        ``[G, K]`` kept tokens.

    Returns
    -------
    Tensor
        ``[G, K, D]`` float32: plain mean of a kept token and every dropped one whose cosine is largest with it; the
        first of several.
    """
    states = states.float()
    unit = torch.nn.functional.normalize(states, dim=-1)
    similarity = unit @ unit.gather(1, index[..., None].expand(-1, -1, unit.shape[-1])).transpose(1, 2)
    best = similarity.amax(dim=-1, keepdim=True)
    slots = torch.arange(index.shape[1], device=index.device, dtype=torch.int32)
    # argmax leaves open which of equal maxima it returns.
    nearest = torch.where(similarity == best, slots, index.shape[1]).amin(dim=-1).long()
    nearest = nearest.scatter(1, index, slots.long().expand_as(index))
    total = states.new_zeros(len(states), index.shape[1], states.shape[-1])
    total = total.scatter_add(1, nearest[..., None].expand_as(states), states)
    count = states.new_zeros(index.shape).scatter_add(1, nearest, torch.ones_like(nearest, dtype=states.dtype))
    return total / count[..., None]
