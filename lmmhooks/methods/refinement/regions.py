"""Regions of a map at the size of an image: which pixels stand out, how they hang together, and the box around them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from torch import Tensor

__all__ = ["best_regions", "box_of", "number_kept", "top_share"]


def top_share(plane: Tensor, share: float) -> np.ndarray:
    """Bool ``[H, W]``: pixels of a map ``[H, W]`` at or above its ``100 (1 - share)`` percentile (linear)."""
    values = plane.numpy()
    return values >= np.percentile(values, 100 * (1 - share))


def best_regions(mask: np.ndarray, plane: Tensor, count: int, *, by_area: bool = False) -> np.ndarray:
    """Bool ``[H, W]``: the 4-connected regions of a mask with the largest sums (or areas); all if there are fewer."""
    labels, found = ndimage.label(mask)
    score = np.bincount(labels.ravel(), None if by_area else plane.numpy().ravel(), found + 1)[1:]
    kept = np.argsort(-score, kind="stable")[:count] + 1
    return np.isin(labels, kept)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is True in ``[H, W]``, right and bottom exclusive; None where nothing is."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def number_kept(mask: np.ndarray, least: int, share: float) -> int:
    """How many of a mask's 4-connected regions are kept: ``share`` of them, rounded down, at least ``least``."""
    return max(least, int(ndimage.label(mask)[1] * share))
