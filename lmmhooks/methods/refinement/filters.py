"""
Cleaning of maps: sinks, and steps that say nothing; parts of RefAM that carry over to models that answer in text.

RefAM (arXiv:2509.22650) is about diffusion models and has released no code; the criteria here are ours (UNVERIFIED).
A cell is a sink if, in at least half of the layers, heads and steps that are read, it receives more than five times an
even share of all keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmmhooks.geometry import Geometry
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.words import content_pieces, listed_words

__all__ = ["SINK_FILTERS", "content_steps", "sinks", "without"]

SINK_FILTERS = ("none", "drop", "median")


def content_steps(pieces: Sequence[str]) -> Tensor:
    """Bool ``[T]``: tokens that are part of a content word; all of them where there is no such word."""
    found = content_pieces(pieces, listed_words)
    return torch.tensor(found if any(found) else [True] * len(found))


def sinks(rows: Tensor, prompt_length: int, multiple: float = 5.0, share: float = 0.5) -> Tensor:
    """
    Which visual tokens are sinks.

    Parameters
    ----------
    rows
        ``[T, L, H, n]`` attention after the softmax over all keys; the query of step t sees ``prompt_length + t`` keys.
    prompt_length
        Positions of the prompt.
    multiple
        Of an even share, above which a key stands out.
    share
        Of layers, heads and steps in which it has to.

    Returns
    -------
    Tensor
        Bool ``[n]``.
    """
    even = 1 / torch.arange(prompt_length, prompt_length + len(rows), dtype=torch.float64)
    return (rows.double() > multiple * even[:, None, None, None]).double().mean(dim=(0, 1, 2)) >= share


def without(saliency: Saliency, unwanted: Tensor, how: str) -> Saliency:
    """
    A map without some of its tokens' values.

    Parameters
    ----------
    saliency
        The map.
    unwanted
        Bool ``[n]``.
    how
        ``"drop"``: they become 0 and the rest is scaled to the sum that all had; ``"median"``: they become the median
        of the cells around them, 3 x 3 of their grid, others that are unwanted left out.
    """
    values, geometry = saliency.values.clone(), saliency.geometry
    if how == "median":
        return Saliency(_median(values, unwanted, geometry), geometry)
    total = values.sum()
    values[unwanted] = 0.0
    return Saliency(values * (total / values.sum()) if values.sum() > 0 else values, geometry)


def _median(values: Tensor, unwanted: Tensor, geometry: Geometry) -> Tensor:
    out = values.clone()
    for grid in geometry.grids:
        for row, column in (grid.index >= 0).nonzero().tolist():
            token = int(grid.index[row, column])
            if unwanted[token]:
                near = grid.index[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].flatten()
                near = near[near >= 0]
                near = near[~unwanted[near]]
                out[token] = values[near].median() if len(near) else 0.0
    return out
