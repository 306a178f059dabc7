"""Where visual tokens lie on the image, for drawing: values of tokens on the finest grid of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.errors import LmmhooksError
from lmmhooks.geometry import CellGrid, Geometry, geometry_of

if TYPE_CHECKING:
    from PIL import Image

    from lmmhooks.family import Family
    from lmmhooks.layout import VisualSpan

__all__ = ["Cells", "cells_of"]


@dataclass(frozen=True, eq=False)
class Cells:
    """
    Visual tokens of one image on its finest grid.

    Attributes
    ----------
    geometry
        Of the image.
    tokens
        Long ``[n]``: which of the prompt's visual tokens are the image's, in the geometry's order.
    rows, columns
        Of the grid.
    box
        Its rectangle: left, top, right, bottom in pixels of the image.
    scale
        ``[n]`` area of a cell of the grid relative to the token's own, over which its value is spread.
    """

    geometry: Geometry
    tokens: Tensor
    rows: int
    columns: int
    box: tuple[float, float, float, float]
    scale: Tensor

    @property
    def merged(self) -> bool:
        """Several grids show the image (an overview and tiles): cells are means over them."""
        return len(self.geometry.grids) > 1

    def spread(self, values: Tensor) -> Tensor:
        """
        Values ``[V]`` of the prompt's visual tokens as ``[rows, columns]``; NaN where no token is.

        Where several grids show a place, the mean of their densities.
        """
        return self.geometry.grid(values[self.tokens] * self.scale)[0]

    def covered(self, marks: Tensor) -> Tensor:
        """Bool ``[rows, columns]``: cells shown by at least one of the marked tokens ``[V]`` bool."""
        return self.geometry.grid(marks[self.tokens].double())[0].nan_to_num(0.0) > 0


def cells_of(
    family: Family, spans: Sequence[VisualSpan], images: Sequence[Image.Image], processor: Any
) -> tuple[Cells | None, ...]:
    """Cells of every image of a prompt, by its spans; None where the model's grid is not known."""
    found: list[Cells | None] = []
    before = 0
    for image, span in zip(images, spans, strict=False):
        tokens = torch.arange(before, before + len(span))
        before += len(span)
        try:
            geometry = geometry_of(family, span, image.size, processor)
        except LmmhooksError:
            # The answer can be compared without knowing where the model looks.
            found.append(None)
            continue
        finest = min(geometry.grids, key=_cell_area)
        scale = torch.ones(len(span), dtype=torch.float64)
        for grid in geometry.grids:
            scale[grid.index[grid.index >= 0]] = _cell_area(finest) / _cell_area(grid)
        rows, columns = finest.index.shape
        found.append(Cells(geometry, tokens, rows, columns, finest.box, scale))
    return tuple(found)


def _cell_area(grid: CellGrid) -> float:
    width, height = grid.cell
    return width * height
