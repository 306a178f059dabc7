"""Rectangles of tokens and the lattices laid over them, shared by methods that go by place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["lattice_shape", "rectangle"]


def rectangle(row: Tensor, col: Tensor) -> tuple[int, int] | None:
    """
    Rows and columns of a group of tokens if they are a full rectangle of cells in raster order, else None.

    Parameters
    ----------
    row, col
        ``[V]`` long, CPU, as in `TokenGroup`. Cells need not be adjacent: a mosaic that was scaled down is a rectangle
        of every other cell, say.
    """
    rows, cols = row.unique(), col.unique()
    if (row < 0).any() or len(rows) * len(cols) != len(row):
        return None
    is_raster = torch.equal(row, rows.repeat_interleave(len(cols))) and torch.equal(col, cols.repeat(len(rows)))
    return (len(rows), len(cols)) if is_raster else None


def lattice_shape(rows: int, cols: int, num_keep: int) -> tuple[int, int]:
    """
    Rows R and columns S of the lattice: ``R * S = K`` with R/S closest to ``rows/cols``.

    Where no factorisation is within a factor of two of that ratio (K prime, say), R is ``round(sqrt(K * rows / cols))``
    and ``R * S`` exceeds K by less than R. Of two equally good shapes, the one with fewer rows.
    """

    def distortion(shape: tuple[int, int]) -> float:
        sides = shape[0] * cols, shape[1] * rows
        return max(sides) / min(sides)

    fits = [(r, num_keep // r) for r in range(1, min(rows, num_keep) + 1) if num_keep % r == 0]
    best = min((shape for shape in fits if shape[1] <= cols), key=distortion, default=None)
    if best is not None and distortion(best) <= 2:
        return best
    r = min(max(round(math.sqrt(num_keep * rows / cols)), -(-num_keep // cols), 1), rows, num_keep)
    return r, -(-num_keep // r)
