"""
Pruning recipes: how many visual tokens every decoder layer deletes, for a target reduction of the visual FLOPs.

A recipe is a curve: the share of the original visual tokens that layer l leaves. Published ones are for 32 layers and
576 tokens; other depths and reductions in between are interpolated (our extension).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lmmhooks.cost import DecoderShape, literature_macs

__all__ = ["PUBLISHED", "Recipes", "fit_recipe", "kept_curve", "left_after", "longest_prefix"]

Recipes = tuple[tuple[float, tuple[float, ...]], ...]
"""Pairs of a reduction in (0, 1) and, per layer, the share of the original visual tokens deleted in it; ascending."""

_LLAVA = {
    10: "0,0,1,2,1,0,1,4,5,5,11,4,2,2,0,0,1,1,2,4,2,10,1,1,1,2,1,1,0,1,0,0",
    20: "0,0,3,3,1,1,4,16,14,15,24,4,2,3,2,0,6,0,5,13,4,19,2,1,1,1,1,1,2,1,0,0",
    30: "0,0,7,6,4,5,16,40,24,21,24,4,2,3,4,0,16,0,11,26,6,32,3,1,0,1,2,2,4,0,0,0",
    40: "0,1,21,13,14,11,41,53,29,15,14,5,1,4,5,1,26,1,13,28,6,27,2,1,0,0,1,1,2,0,0,0",
    50: "3,7,49,24,29,17,59,41,26,8,10,6,2,5,7,2,30,3,13,27,5,23,2,1,0,0,1,1,2,0,0,0",
    60: "14,33,89,36,36,20,55,21,18,4,7,5,2,5,7,4,26,5,11,24,4,18,2,1,0,0,1,0,1,0,0,0",
    70: "48,79,118,41,33,17,36,9,9,2,3,2,1,3,4,8,18,7,8,20,4,13,2,1,0,0,1,0,1,0,0,0",
    80: "128,127,118,35,26,8,13,3,2,1,0,0,0,2,1,8,7,8,5,11,2,6,1,1,0,0,0,1,0,0,0,0",
    90: "262,153,80,19,13,1,2,0,0,0,0,0,0,0,0,1,1,2,1,2,0,1,0,0,0,0,0,1,0,0,0,0",
}
_LLAVA_TOKENS = 576

PUBLISHED: Mapping[str, Recipes] = {
    "llava-1.5-7b": tuple(
        (percent / 100, tuple(int(number) / _LLAVA_TOKENS for number in listed.split(",")))
        for percent, listed in _LLAVA.items()
    )
}
"""Recipes by name, per released file; tokens as shares of 576."""


def kept_curve(recipes: Recipes, reduction: float, num_layers: int) -> list[float]:
    """
    Share of the original visual tokens left by every layer.

    Parameters
    ----------
    recipes
        For a decoder of any depth.
    reduction
        In [0, 1]; at 0 everything stays, at 1 nothing does, and a reduction between two recipes lies between them in
        proportion.
    num_layers
        Depth of the decoder. Where it is not that of the recipes, deletions are interpolated over relative depth.

    Returns
    -------
    list of float
        One per layer, falling; larger for a smaller reduction.
    """
    depth = len(recipes[0][1])
    curves = [(0.0, [1.0] * depth)]
    for target, deleted in recipes:
        kept = [1 - share for share in accumulate(deleted)]
        # Fitted recipes may cross; a budget needs curves that do not.
        curves.append((target, [min(now, before) for now, before in zip(kept, curves[-1][1], strict=True)]))
    curves.append((1.0, [0.0] * depth))
    upper = next(place for place, (target, _) in enumerate(curves) if target >= reduction)
    (low, more), (high, less) = curves[max(upper - 1, 0)], curves[upper]
    weight = (reduction - low) / (high - low) if high > low else 0.0
    curve = [(1 - weight) * a + weight * b for a, b in zip(more, less, strict=True)]
    if num_layers == depth:
        return curve
    points = [1.0, *curve]
    return [_between(points, (layer + 1) * depth / num_layers) for layer in range(num_layers)]


def _between(points: Sequence[float], place: float) -> float:
    low = min(int(place), len(points) - 2)
    return points[low] + (place - low) * (points[low + 1] - points[low])


def longest_prefix(scores: Tensor, least: Tensor | float) -> Tensor:
    """
    Tokens that may go in order of rising score while the total of the others stays at ``least``, but for the last one.

    Parameters
    ----------
    scores
        ``[V]``, at least 0.
    least
        Of the sum of what stays.

    Returns
    -------
    Tensor
        ``[V]`` bool.
    """
    order = scores.sort(stable=True).indices
    left = scores.sum() - scores[order].cumsum(dim=0)
    number = int((left >= least).sum()) - 1
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, order[: max(number, 0)], True)


def left_after(
    received: Sequence[Tensor], cross: Sequence[Tensor], alpha: float, shape: DecoderShape, budget: float
) -> tuple[list[int], bool]:
    """
    Tokens one sample deletes per layer when every layer may lose a share of what the unpruned model's tokens receive.

    Parameters
    ----------
    received, cross
        Per layer ``[V]``: attention from visual rows and from the text after the image, head maximum, summed.
    alpha
        Share that may be lost, in [0, 1]. Every sample has its own (UNVERIFIED: how the released script joins samples).
    shape
        Of the decoder.
    budget
        Visual multiply-adds at which to stop.

    Returns
    -------
    tuple
        Deletions per layer, and whether the budget was met.
    """
    alive = torch.ones_like(received[0], dtype=torch.bool)
    deleted = [0] * len(received)
    spent = 0
    for layer, (own, text) in enumerate(zip(received, cross, strict=True)):
        num = int(alive.sum())
        spent += literature_macs(shape, [num])
        places = alive.nonzero().flatten()
        goes = longest_prefix(text[places], (1 - alpha) * text.sum())
        goes &= longest_prefix(own[places], (1 - alpha) * own.sum())
        deleted[layer] = int(goes.sum())
        alive[places[goes]] = False
        if spent + literature_macs(shape, [num - deleted[layer]] * (len(received) - layer - 1)) <= budget:
            return deleted, True
    return deleted, False


def fit_recipe(
    samples: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], reduction: float, shape: DecoderShape
) -> tuple[float, ...] | None:
    """
    The recipe that reaches a reduction at the smallest loss of received attention.

    Parameters
    ----------
    samples
        ``received`` and ``cross`` of each, as in `left_after`.
    reduction
        Of the visual multiply-adds, in (0, 1).
    shape
        Of the decoder.

    Returns
    -------
    tuple of float or None
        Share of the visual tokens deleted per layer; whole tokens of the mean over samples that have equally many.
        None where no loss reaches the reduction, because the first layers alone cost more.
    """
    schemes = [_smallest_loss(own, text, reduction, shape) for own, text in samples]
    if any(scheme is None for scheme in schemes):
        return None
    found = [scheme for scheme in schemes if scheme is not None]
    sizes = [len(own[0]) for own, _ in samples]
    if len(set(sizes)) == 1:
        return tuple(sum(column) // len(column) / sizes[0] for column in zip(*found, strict=True))
    shares = [[number / size for number in scheme] for scheme, size in zip(found, sizes, strict=True)]
    return tuple(sum(column) / len(column) for column in zip(*shares, strict=True))


def _smallest_loss(
    received: Sequence[Tensor], cross: Sequence[Tensor], reduction: float, shape: DecoderShape
) -> list[int] | None:
    """Deletions of one sample per layer at the smallest alpha that meets the reduction."""
    budget = (1 - reduction) * literature_macs(shape, [len(received[0])] * len(received))
    best, met = left_after(received, cross, 1.0, shape, budget)
    if not met:
        return None
    low, high = 0.0, 1.0
    # The interval of the released search.
    while high - low > 0.01:
        middle = (low + high) / 2
        deleted, met = left_after(received, cross, middle, shape, budget)
        if met:
            best, high = deleted, middle
        else:
            low = middle
    return best
