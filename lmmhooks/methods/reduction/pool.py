"""
Pooling: replace the token grid of every crop by a smaller one, each cell the mean or maximum of what it covers.

The merging control next to `random` and `uniform-grid`: all tokens are heard, none is looked for. Reference:
github.com/TianfanPeng/VLMUniPruneBench, generalised here from its 4, 16 or 25 tokens. Differs from it in that a grid is
never guessed from the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.lattice import lattice_shape, rectangle
from lmmhooks.methods.reduction.merging import embed, feature_probes, features, merges_before_projector

__all__ = ["Pool", "cell_centers", "pool_cells", "pooled_shape"]


@dataclass(frozen=True)
class Pool(CropwiseMethod):
    """
    Adaptive two-dimensional pooling of every crop before the decoder.

    The grid is the largest with at most ``keep`` cells that is about as wide as the crop, so a prime ``keep`` leaves a
    few tokens less. A pooled token takes the place of the one at the floor of its cell's mean row and column, where
    positions (M-RoPE) are kept, and that token's deepstack features; temporal positions stay. Crops whose tokens are
    no rectangle are refused at run time.
    """

    id: ClassVar[str] = "pool"
    paper: ClassVar[str] = "none; control"
    code: ClassVar[str] = "https://github.com/TianfanPeng/VLMUniPruneBench"

    mode: Literal["avg", "max"] = setting("avg", help="What becomes of the tokens of a cell: their mean or maximum.")
    before_projector: bool = setting(
        False,
        help="Pool what the projector takes, where it takes single patches, and project the cells: cheaper, and not "
        "the same, because projectors are not linear.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.mode in ("avg", "max"), "mode", "'avg' or 'max'")

    def check(self, family: Any) -> None:
        super().check(family)
        if self.before_projector and not merges_before_projector(family):
            raise MethodError(
                f"{self.id}: before_projector=True needs a projector that takes single patches, which {family.name} "
                "has not; use before_projector=False"
            )

    def probes(self, family: Any) -> list[Probe]:
        return feature_probes(family) if self.before_projector else []

    def select(self, tokens: TokenGroup) -> Tensor:
        rows, cols = self._grid(tokens)
        index = cell_centers(rows, cols, *pooled_shape(rows, cols, tokens.num_keep))
        return index.to(tokens.position.device).expand(len(tokens.sample), -1)

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor:
        grid = self._grid(tokens)
        values = features(tokens) if self.before_projector else tokens.states.float()
        pooled = pool_cells(values, grid, pooled_shape(*grid, tokens.num_keep), self.mode)
        return embed(tokens, pooled) if self.before_projector else pooled.to(tokens.hidden.dtype)

    def _grid(self, tokens: TokenGroup) -> tuple[int, int]:
        grid = rectangle(tokens.row, tokens.col)
        if grid is None:
            raise PromptError(
                f"{self.id}: the {len(tokens.row)} visual tokens of a crop are no rectangle of known cells, so "
                "there is nothing to pool over; use a method that goes by tokens, such as uniform-grid"
            )
        return grid


def pooled_shape(rows: int, cols: int, num_keep: int) -> tuple[int, int]:
    """Rows and columns of the largest lattice of at most ``num_keep`` cells that `lattice_shape` finds without rest."""
    shapes = ((*lattice_shape(rows, cols, count), count) for count in range(num_keep, 0, -1))
    return next((r, c) for r, c, count in shapes if r * c == count)


def cell_centers(rows: int, cols: int, out_rows: int, out_cols: int) -> Tensor:
    """Per cell of adaptive pooling, the token at the floor of its mean row and column; long ``[K]``, ascending."""

    def middle(size: int, count: int, i: int) -> int:
        first, last = i * size // count, -(-(i + 1) * size // count) - 1
        return (first + last) // 2

    down = torch.tensor([middle(rows, out_rows, i) for i in range(out_rows)])
    across = torch.tensor([middle(cols, out_cols, j) for j in range(out_cols)])
    return (down[:, None] * cols + across).flatten()


def pool_cells(features: Tensor, grid: tuple[int, int], shape: tuple[int, int], mode: str) -> Tensor:
    """
    Adaptive pooling of tokens in raster order.

    Cell i of R covers rows ``floor(i * rows / R)`` to ``ceil((i + 1) * rows / R) - 1``, columns likewise; cells may
    share a row.

    Parameters
    ----------
    features
        ``[G, V, C]`` with V the product of ``grid``.
    grid, shape
        Rows and columns before and after.
    mode
        ``"avg"`` or ``"max"``.

    Returns
    -------
    Tensor
        ``[G, K, C]``.
    """
    pool = adaptive_avg_pool2d if mode == "avg" else adaptive_max_pool2d
    pooled: Tensor = pool(features.transpose(1, 2).unflatten(2, grid), shape)
    return pooled.flatten(2).transpose(1, 2)
