"""
Downsampling: the control that gives the model fewer pixels instead of fewer tokens.

A reducer that does not beat it earns nothing: an image of half the size has a quarter of the tokens, costs less in the
vision tower too, and needs no method. VTC-Bench sorts questions by it: those a downsampled image still answers say
nothing about a reducer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.reduction.base import CropwiseMethod, Cut, TokenGroup
from lmmhooks.smaller import centres

__all__ = ["Downsample", "best_grid"]


@dataclass(frozen=True)
class Downsample(CropwiseMethod):
    """
    Every crop is scaled down (bicubic, antialiased) before the vision tower, position embeddings are interpolated.

    ``keep`` or ``budget`` are met by the largest grid of whole cells that has about the image's aspect ratio, so that
    up to a row of tokens fewer may remain. Each token of the small image takes the place of the one in the middle of
    what it shows: M-RoPE coordinates stay those of the full image, where an image that had been small to begin with
    would have coordinates of its own. On models that cut images into tiles a count is per tile (``keep_per='crop'``).
    """

    id: ClassVar[str] = "downsample"
    paper: ClassVar[str] = "none; control (as in VTC-Bench)"
    counts_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.budget_unit in ("average", "kept"), "budget_unit", "'average' or 'kept'")

    def check(self, family: Any) -> None:
        super().check(family)
        family.check_smaller()
        given = self.keep if self.budget is None else self.budget
        if isinstance(given, int) and self.keep_per != "crop" and family.has_tiles:
            raise MethodError(
                f"downsample: {given} tokens per {self.keep_per} cannot be shared out over the tiles of {family.name} "
                "before they are encoded; give a share, or keep_per='crop'"
            )

    def cuts(self, family: Any) -> list[Cut]:
        super().cuts(family)
        return [Cut(0, None)]

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Rows and columns of the small image for a crop of ``rows x cols`` tokens."""
        given = self.keep if self.budget is None else self.budget
        assert given is not None
        count = self.count(given, rows * cols) if isinstance(given, float) else max(1, min(given, rows * cols))
        return best_grid(rows, cols, count)

    def select(self, tokens: TokenGroup) -> Tensor:
        if tokens.grid is None:
            raise MethodError("downsample: the token grid of this image is not known")
        rows, cols = tokens.grid
        small_rows, small_cols = self.grid(rows, cols)
        chosen = torch.isin(tokens.row, centres(rows, small_rows)) & torch.isin(tokens.col, centres(cols, small_cols))
        return chosen.nonzero().flatten().to(tokens.position.device).expand(len(tokens.sample), -1)


def best_grid(rows: int, cols: int, num_keep: int) -> tuple[int, int]:
    """
    The largest grid of at most ``num_keep`` cells that distorts the aspect ratio by half at most.

    Of equally large ones, the one that distorts least, then the one with fewer rows. Where there are so few cells that
    all distort more, by two at most; where that fails too, the one that distorts least.
    """
    fits = [(r, c) for r in range(1, rows + 1) for c in range(1, min(cols, num_keep // r) + 1)]

    def distortion(shape: tuple[int, int]) -> float:
        sides = shape[0] * cols, shape[1] * rows
        return max(sides) / min(sides)

    for limit in (1.5, 2.0):
        even = [shape for shape in fits if distortion(shape) <= limit]
        if even and (limit == 2.0 or 2 * max(r * c for r, c in even) >= num_keep):
            return max(even, key=lambda shape: (shape[0] * shape[1], -distortion(shape), -shape[0]))
    return min(fits, key=lambda shape: (distortion(shape), -shape[0] * shape[1]))
