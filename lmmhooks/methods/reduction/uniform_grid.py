"""
Uniform grid: keep a spatially regular subset of every crop's tokens.

The deterministic control next to `random`. Flat strides, which released code uses (PruMerge+ samples, VisionZip
targets, HiRED's baseline), sample few columns where the stride shares factors with the row length (24 columns: stride
24 visits one of them, stride 12 two), so the default is a lattice in two dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup

__all__ = ["UniformGrid", "grid_indices", "lattice_shape", "stride_indices"]


@dataclass(frozen=True)
class UniformGrid(CropwiseMethod):
    """
    A regular lattice of tokens before the decoder, in raster order.

    Crops without a rectangular grid (unknown geometry, interpolated mosaics, tokens already removed) are sampled by
    stride. Unpadded crops are rectangles, only smaller.
    """

    id: ClassVar[str] = "uniform-grid"
    paper: ClassVar[str] = "none; control"

    mode: Literal["grid2d", "stride"] = setting(
        "grid2d", help="'grid2d': rows and columns; 'stride': every n-th token."
    )
    offset: Literal["center", "corner"] = setting(
        "center",
        help="'center' samples the middle of every cell or stride, 'corner' its first token (released strides).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.mode in ("grid2d", "stride"), "mode", "'grid2d' or 'stride'")
        self._require(self.offset in ("center", "corner"), "offset", "'center' or 'corner'")

    def select(self, tokens: TokenGroup) -> Tensor:
        num_tokens = len(tokens.row)
        shape = _rectangle(tokens.row, tokens.col)
        center = self.offset == "center"
        if self.mode == "grid2d" and shape is not None:
            index = grid_indices(*shape, tokens.num_keep, center)
        else:
            index = stride_indices(num_tokens, tokens.num_keep, center)
        return index.to(tokens.position.device).expand(len(tokens.sample), -1)


def _rectangle(row: Tensor, col: Tensor) -> tuple[int, int] | None:
    """Size of the grid if the tokens are a full rectangle of cells in raster order, else None."""
    rows, cols = row.unique(), col.unique()
    if (row < 0).any() or len(rows) * len(cols) != len(row):
        return None
    is_raster = torch.equal(row, rows.repeat_interleave(len(cols))) and torch.equal(col, cols.repeat(len(rows)))
    return (len(rows), len(cols)) if is_raster else None


def stride_indices(num_tokens: int, num_keep: int, center: bool) -> Tensor:
    """Every ``num_tokens // num_keep``-th of the flat order, the first ``num_keep`` of them; long ``[K]``."""
    step = num_tokens // num_keep
    return torch.arange(num_keep) * step + (step // 2 if center else 0)


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


def grid_indices(rows: int, cols: int, num_keep: int, center: bool) -> Tensor:
    """
    Flat indices of a regular lattice.

    Row i of R lies at ``floor((i + 0.5) * rows / R)`` (``corner``: without the 0.5), columns likewise. Where
    ``R * S > K``, the rows farthest from the middle hold one column less, spaced evenly again (our choice,
    symmetric where the rest is).

    Returns
    -------
    Tensor
        Long ``[K]``, ascending, unique.
    """
    num_rows, num_cols = lattice_shape(rows, cols, num_keep)
    surplus = num_rows * num_cols - num_keep
    by_distance = sorted(range(num_rows), key=lambda i: (-abs(2 * i - num_rows + 1), i))
    shortened = set(by_distance[:surplus])
    index = []
    for i, row in enumerate(_samples(rows, num_rows, center)):
        width = num_cols - 1 if i in shortened else num_cols
        index += [row * cols + col for col in _samples(cols, width, center)]
    return torch.tensor(index)


def _samples(size: int, count: int, center: bool) -> list[int]:
    # Integers throughout: (i + 0.5) * size / count, rounded down.
    return [(2 * i + center) * size // (2 * count) for i in range(count)]
