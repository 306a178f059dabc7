"""
Uniform grid: keep a spatially regular subset of every crop's tokens.

The deterministic control next to `random`. Flat strides, which released code uses (PruMerge+ samples, VisionZip
targets, HiRED's baseline), sample few columns where the stride shares factors with the row length (24 columns: stride
24 visits one of them, stride 12 two), so the default is a lattice in two dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.lattice import lattice_shape, rectangle

__all__ = ["UniformGrid", "grid_indices", "stride_indices"]


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
        shape = rectangle(tokens.row, tokens.col)
        center = self.offset == "center"
        if self.mode == "grid2d" and shape is not None:
            index = grid_indices(*shape, tokens.num_keep, center)
        else:
            index = stride_indices(num_tokens, tokens.num_keep, center)
        return index.to(tokens.position.device).expand(len(tokens.sample), -1)


def stride_indices(num_tokens: int, num_keep: int, center: bool) -> Tensor:
    """Every ``num_tokens // num_keep``-th of the flat order, the first ``num_keep`` of them; long ``[K]``."""
    step = num_tokens // num_keep
    return torch.arange(num_keep) * step + (step // 2 if center else 0)


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
