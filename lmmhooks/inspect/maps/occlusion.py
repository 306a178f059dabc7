"""
Occlusion: how much less probable the answer is when a part of the image is hidden.

"Visualizing and Understanding Convolutional Networks" (ECCV 2014, 1311.2901), on the model's own cells: blocks of them
are painted over, and the drop of the log-probability of each token of the answer is the block's value. Knows nothing of
how the model works, and so is what other maps can be held against; one reading of the prompt per block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question

if TYPE_CHECKING:
    from lmmhooks.geometry import CellGrid

__all__ = ["Occlusion", "blocks", "covered", "filling", "spread"]

FILLS = ("mean", "blur")
BLUR = 0.1
"""Standard deviation of the blur as a share of the image's longer side; own choice: objects are gone, colours stay."""

Box = tuple[float, float, float, float]


def filling(image: Image.Image, fill: str) -> Image.Image:
    """What hides parts of an image: its ``"mean"`` colour everywhere, or the image after a ``"blur"``."""
    if fill == "blur":
        return image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size)))
    mean = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 3).double().mean(dim=0)
    return Image.new("RGB", image.size, tuple(round(value) for value in mean.tolist()))


def covered(image: Image.Image, boxes: Sequence[Box], filled: Image.Image) -> Image.Image:
    """The image with some boxes (in pixels, widened to whole ones) replaced by what is there in ``filled``."""
    out = image.copy()
    for left, top, right, bottom in boxes:
        # What lies beyond the image is padding to the model, and cannot be hidden.
        whole = (
            max(math.floor(left), 0),
            max(math.floor(top), 0),
            min(math.ceil(right), image.width),
            min(math.ceil(bottom), image.height),
        )
        if whole[0] < whole[2] and whole[1] < whole[3]:
            out.paste(filled.crop(whole), whole[:2])
    return out


def blocks(grid: CellGrid, side: int) -> list[Box]:
    """Boxes of ``side`` x ``side`` cells that tile a grid, row by row; those at its end may be smaller."""
    left, top, _, _ = grid.box
    width, height = grid.cell
    rows, columns = grid.index.shape

    def spans(cells: int, start: float, size: float) -> Iterator[tuple[float, float]]:
        for first in range(0, cells, side):
            yield start + first * size, start + min(first + side, cells) * size

    return [(x0, y0, x1, y1) for y0, y1 in spans(rows, top, height) for x0, x1 in spans(columns, left, width)]


def spread(drops: Tensor, boxes: Sequence[Box], rectangles: Tensor) -> Tensor:
    """
    Values of blocks as values of tokens: each gets that of the block its centre lies in.

    Parameters
    ----------
    drops
        ``[..., blocks]``.
    boxes
        Of the blocks.
    rectangles
        ``[n, 4]`` of the tokens; NaN for those without a cell.

    Returns
    -------
    Tensor
        ``[..., n]``; NaN for tokens in no block.
    """
    edges = torch.tensor(boxes, dtype=torch.float64)
    x, y = (rectangles[:, 0] + rectangles[:, 2]) / 2, (rectangles[:, 1] + rectangles[:, 3]) / 2
    inside = (edges[:, 0] <= x[:, None]) & (x[:, None] < edges[:, 2])
    inside &= (edges[:, 1] <= y[:, None]) & (y[:, None] < edges[:, 3])
    found = drops[..., inside.int().argmax(dim=1)]
    return found.masked_fill(~inside.any(dim=1), torch.nan)


def finest(question: Question) -> CellGrid:
    """The grid of the smallest cells."""
    return min(question.geometry.grids, key=lambda grid: grid.cell[0] * grid.cell[1])


@dataclass(frozen=True)
class Occlusion(MapKind):
    """
    Drop of the log-probability of a token when a block of cells is hidden; negative where hiding helps.

    Attributes
    ----------
    block
        Cells along the side of a block; 0: an eighth of the grid's longer side, at least 1.
    fill
        What is shown instead: the image's ``"mean"`` colour, or a ``"blur"`` of it.
    batch
        Pictures in a forward.
    """

    block: int = 0
    fill: str = "mean"
    batch: int = 8

    id: ClassVar[str] = "occlusion"
    uses_layers: ClassVar[bool] = False
    paper: ClassVar[str] = "Occlusion, ECCV 2014 (1311.2901)"

    def __post_init__(self) -> None:
        self._require(self.block >= 0, "block", "0 or more cells")
        self._require(self.fill in FILLS, "fill", f"one of {', '.join(FILLS)}")
        self._require(self.batch >= 1, "batch", "1 or more pictures")

    def values(self, question: Question) -> Tensor:
        grid = finest(question)
        boxes = blocks(grid, self.block or max(1, math.ceil(max(grid.index.shape) / 8)))
        image: Any = question.passes.images[question.image]
        filled = filling(image, self.fill)
        shown = [image, *(covered(image, [box], filled) for box in boxes)]
        whole, *hidden = question.passes.log_probabilities(shown, question.image, question.answered.new_ids, self.batch)
        drops = (whole - torch.stack(hidden)).T[list(question.rows)]
        return spread(drops, boxes, question.geometry.rectangles()).float()
