"""Numbers of a comparison: functions on the rows and logits of an answer of T tokens, in L decoder layers."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lmmhooks.inspect.maps import measures
from lmmhooks.inspect.maps.result import CARVE_LAYERS

__all__ = ["bands", "carve_entropy", "divergence", "entropy", "mean_map", "ranks", "within_image"]


def within_image(visual: Tensor) -> Tensor:
    """
    Rows restricted to visual tokens and divided by their sum, as in `lmmhooks.inspect.maps.measures`.

    Parameters
    ----------
    visual
        ``[..., V]`` raw attention on visual tokens; NaN for tokens that are not there.

    Returns
    -------
    Tensor
        ``[..., V]``; the tokens that are there sum to 1, or are all NaN where nothing falls on them.
    """
    return measures.within_image(visual).masked_fill(visual.nansum(dim=-1, keepdim=True) == 0, torch.nan)


def entropy(within: Tensor) -> Tensor:
    """
    Entropy ``[...]`` in nats of distributions ``[..., V]``; tokens that are NaN do not count, NaN where all are.

    A uniform row over V tokens has entropy ln V.
    """
    return measures.entropy(within).masked_fill(within.isnan().all(dim=-1), torch.nan)


def carve_entropy(by_layer: Tensor) -> float | None:
    """
    CARVE's scalar: mean entropy over layers 20 to 25 at the last step, natural logarithm, not divided by ln V.

    The authors do not say whether they normalise the weights first (UNVERIFIED); here they are normalised.

    Parameters
    ----------
    by_layer
        ``[T, L]`` entropies.

    Returns
    -------
    float or None
        Over those of the layers that the model has; None where it has none, and where nothing falls on the image.
    """
    known = [layer for layer in CARVE_LAYERS if layer < by_layer.shape[1]]
    if not known or not len(by_layer):
        return None
    value = float(by_layer[-1, known].mean())
    return None if math.isnan(value) else value


def mean_map(within: Tensor) -> Tensor:
    """
    Mean over layers of within-image rows.

    Parameters
    ----------
    within
        ``[T, L, V]``; NaN for tokens that are not there.

    Returns
    -------
    Tensor
        ``[T, V]``: a token that left gives 0 to the mean in the layers it is absent from, so that a map sums to 1; one
        that is absent from the last layer is NaN, which is not 0. Layers that could not be read are left out.
    """
    read = ~within.isnan().all(dim=-1, keepdim=True)
    mean = within.nan_to_num(0.0).sum(dim=1) / read.sum(dim=1)
    if not within.shape[1]:
        return mean
    return mean.masked_fill(within[:, -1].isnan() & read[:, -1], torch.nan)


def bands(num_layers: int, most: int) -> list[tuple[int, int]]:
    """The layers in at most that many consecutive groups of nearly equal size, as (first, last)."""
    num = max(1, min(most, num_layers))
    edges = [round(i * num_layers / num) for i in range(num + 1)]
    return [(first, last - 1) for first, last in pairwise(edges)]


def ranks(logp: Tensor, targets: Tensor) -> Tensor:
    """
    Rank ``[T]`` of each target among all tokens, 1 for the most likely; tokens as likely as the target do not count.

    Parameters
    ----------
    logp
        ``[T, vocabulary]``.
    targets
        Long ``[T]``.
    """
    return (logp > logp.gather(1, targets[:, None])).sum(dim=1) + 1


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """
    Kullback-Leibler divergence KL(p || q) ``[T]`` in nats.

    Parameters
    ----------
    p, q
        ``[T, vocabulary]`` log-probabilities; -inf for tokens that are ruled out.

    Returns
    -------
    Tensor
        Infinite where q rules out what p does not.
    """
    impossible = p == -math.inf
    terms = p.exp() * (p.masked_fill(impossible, 0.0) - q.masked_fill(impossible, 0.0))
    # Rounding may carry the divergence of equal distributions below 0.
    return terms.masked_fill(impossible, 0.0).sum(dim=-1).clamp(min=0.0)
