"""Numbers of maps over the cells of an image: normalisation, entropy, sinks; pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["entropy", "favouring", "sinks_of", "within_image"]

#: A sink receives more than this multiple of an even share, in at least that share of all pairs of layer and head.
SINK_FACTOR, SINK_PAIRS = 5.0, 0.5


def within_image(values: Tensor) -> Tensor:
    """
    Values restricted to an image: divided by their sum.

    Parameters
    ----------
    values
        ``[..., n]``, at least 0; NaN for tokens without a value.

    Returns
    -------
    Tensor
        ``[..., n]``, summing to 1 over the tokens that have a value; all 0 where nothing falls on the image.
    """
    total = values.nansum(dim=-1, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)


def entropy(values: Tensor) -> Tensor:
    """
    Entropy of within-image rows, in nats.

    Parameters
    ----------
    values
        ``[..., n]`` shares of the n tokens, in any scale; NaN for tokens without a value, which do not count.

    Returns
    -------
    Tensor
        ``[...]`` in [0, ln n]; ln n for a uniform row, 0 for one cell alone and where nothing falls on the image.
    """
    return torch.special.entr(within_image(values).nan_to_num(0.0)).sum(dim=-1)


def favouring(shares: Tensor, num_keys: int, factor: float = SINK_FACTOR) -> Tensor:
    """
    Heads that give a token more than ``factor`` even shares of the whole row.

    Parameters
    ----------
    shares
        ``[H, n]`` raw shares: after the softmax over all keys.
    num_keys
        Keys the row can see, N; an even share is 1 / N.

    Returns
    -------
    Tensor
        Long ``[n]``, 0 to H.
    """
    return (shares > factor / num_keys).sum(dim=0)


def sinks_of(favoured: Tensor, pairs: int, least: float = SINK_PAIRS) -> Tensor:
    """
    Tokens that are favoured nearly everywhere, whatever is asked.

    Parameters
    ----------
    favoured
        ``[n]`` in how many pairs of layer and head (and row, if there are several) a token is favoured.
    pairs
        How many pairs there are.
    least
        Share of the pairs in which a sink is favoured.

    Returns
    -------
    Tensor
        Bool ``[n]``.
    """
    return (favoured >= least * pairs) & (favoured > 0)
