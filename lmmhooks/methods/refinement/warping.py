"""
Rectilinear warps of AttWarp: columns and rows become as wide and as high as the attention they hold.

A warp is two monotone, piecewise linear functions, one per axis. Each is given by its knots: where the edges between
pixels come to lie. Functions here are about one axis; lengths are pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["MONOTONE", "TRANSFORMS", "backwards", "capped", "densities", "forwards", "knots", "magnification"]

#: Put on every pixel's attention by the released code, so that none vanishes.
FLOOR = 1e-9

#: Functions of attention, and their inverses.
TRANSFORMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "identity": (lambda x: x, lambda x: x),
    "sqrt": (np.sqrt, np.square),
    "square": (np.square, lambda x: np.sqrt(np.maximum(x, 0))),
    "exp": (np.exp, lambda x: np.log(np.maximum(x, FLOOR))),
    "log": (lambda x: np.log(x + 1e-5), lambda x: np.exp(x) - 1e-5),
}
#: Those that leave densities positive, so that columns and rows keep their order; released are all of them.
MONOTONE = ("identity", "sqrt", "square", "exp")


def densities(
    attention: np.ndarray, transform: str = "identity", invert: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    How much attention every column and every row holds.

    Parameters
    ----------
    attention
        ``[height, width]``; negative values count as 0.
    transform
        Function of the attention, one of `TRANSFORMS`.
    invert
        Whether its inverse is applied to the sums.

    Returns
    -------
    tuple
        ``[width]`` and ``[height]`` float64; all ones where the sums hold next to nothing.
    """
    height, width = attention.shape
    function, inverse = TRANSFORMS[transform]
    amount = function(np.maximum(attention.astype(np.float64), 0)) + FLOOR
    columns, rows = amount.sum(axis=0), amount.sum(axis=1)
    if invert:
        columns = inverse(columns - FLOOR * height) + FLOOR * height
        rows = inverse(rows - FLOOR * width) + FLOOR * width
    if columns.sum() < FLOOR or rows.sum() < FLOOR:
        return np.ones(width), np.ones(height)
    return columns, rows


def magnification(density: np.ndarray) -> float:
    """How much wider than in a plain resize the widest pixel becomes; 1 for none."""
    return float(density.max() / density.mean())


def capped(density: np.ndarray, limit: float | None) -> np.ndarray:
    """As much of an even density mixed in as keeps `magnification` at a limit, 1 or more; None: nothing."""
    widest = magnification(density)
    if limit is None or widest <= limit:
        return density
    share = (widest - limit) / (widest - 1)
    return (1 - share) * density + share * density.mean()


def knots(density: np.ndarray, length: int) -> np.ndarray:
    """``[n + 1]`` ascending from 0 to ``length``: where the edges of n pixels lie after the warp."""
    edges = length * np.concatenate([[0.0], np.cumsum(density) / density.sum()])
    edges[-1] = length
    return edges


def backwards(places: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Where places of the warped axis lie on the original one."""
    return np.interp(places, edges, np.arange(len(edges)))


def forwards(places: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Where places of the original axis lie on the warped one."""
    return np.interp(places, np.arange(len(edges)), edges)
