"""A map of what matters in an image: one value per visual token, and where these lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmmhooks.geometry import Geometry

__all__ = ["Saliency"]


@dataclass(frozen=True, eq=False)
class Saliency:
    """
    A map of an image.

    Attributes
    ----------
    values
        ``[n]`` per visual token, larger where it matters more; not finite values count as nothing.
    geometry
        Where the tokens lie.
    """

    values: Tensor
    geometry: Geometry

    def __post_init__(self) -> None:
        values = self.values.double().cpu()
        object.__setattr__(self, "values", torch.where(values.isfinite(), values, 0.0))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image."""
        return self.geometry.size

    @cached_property
    def spread(self) -> float:
        """Standard deviation over mean of the cells' values; 0 for a map of no mass."""
        cells = self.values[~self.geometry.rectangles().isnan().any(dim=1)]
        mean = float(cells.mean()) if len(cells) else 0.0
        return float(cells.std(unbiased=False)) / mean if mean > 0 else 0.0

    def grid(self) -> tuple[Tensor, tuple[float, float, float, float]]:
        """The map ``[rows, columns]`` on the finest grid of the model, 0 where no token is, and the grid's box."""
        grid, box = self.geometry.grid(self.values)
        return grid.nan_to_num(nan=0.0), box

    def plane(self) -> Tensor:
        """The map ``[height, width]`` at the size of the image, bilinear; 0 where the model sees nothing."""
        return self.geometry.plane(self.values).nan_to_num(nan=0.0)
