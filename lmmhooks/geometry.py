"""
Cell geometry: which rectangle of the original image each visual token shows.

A token shows a cell of a crop (`lmmhooks.vision.ImageTokens`), and a crop shows a part of the original image that
depends on what the image processor resizes, crops away and pads. The families know both (`lmmhooks.placing`); here the
cells of one image are held as regular grids, and values of tokens are painted onto the image.

Everything is computed in float64 on the CPU: the arrays are small, and maps are compared with one another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .errors import PromptError
from .layout import VisualSpan
from .vision import ImageTokens

__all__ = ["Box", "CellGrid", "Geometry", "Size", "geometry_of"]

#: Left, top, right and bottom, in pixels of the original image.
Box = tuple[float, float, float, float]
#: Width and height, in pixels.
Size = tuple[int, int]
Mode = Literal["bilinear", "nearest", "exact"]

#: Share of the width or height of a pixel below which an overlap is a rounding error.
_TOUCH = 1e-9


@dataclass(frozen=True, eq=False)
class CellGrid:
    """
    A regular grid of cells over a rectangle of the original image.

    Attributes
    ----------
    index
        Long ``[rows, columns]`` on the CPU: which of the image's visual tokens (0-based, in sequence order) shows a
        cell; -1 for cells without a token (removed by a reduction).
    box
        The rectangle that all cells together tile. May reach beyond the image where the model sees padding.
    kind
        ``"image"`` (the only view of the image), ``"base"`` or ``"thumbnail"`` (all of the image beside its tiles),
        ``"tiles"`` (all tiles together) or ``"frame"`` (one temporal step of a video).
    """

    index: Tensor
    box: Box
    kind: str

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell, in pixels of the original image."""
        left, top, right, bottom = self.box
        rows, columns = self.index.shape
        return (right - left) / columns, (bottom - top) / rows


@dataclass(frozen=True, eq=False)
class Geometry:
    """
    Where each visual token of one image lies in the original image.

    Values of tokens are ``[num_tokens]`` of any dtype and device. NaN among them counts as no value.

    Attributes
    ----------
    size
        Width and height of the original image, or of a frame.
    num_tokens
        Visual tokens of the image, with a cell or not (newline tokens and CLS have none).
    grids
        In the order in which their tokens stand in the sequence.
    """

    size: Size
    num_tokens: int
    grids: tuple[CellGrid, ...]

    def rectangles(self) -> Tensor:
        """Left, top, right and bottom of every token's cell: float64 ``[num_tokens, 4]``, NaN where it has none."""
        out = torch.full((self.num_tokens, 4), torch.nan, dtype=torch.float64)
        for grid in self.grids:
            row, column = (grid.index >= 0).nonzero(as_tuple=True)
            left, top, _, _ = grid.box
            width, height = grid.cell
            sides = [left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height]
            out[grid.index[row, column]] = torch.stack([side.double() for side in sides], dim=1)
        return out

    def plane(self, values: Tensor, mode: Mode = "bilinear") -> Tensor:
        """
        Values of tokens painted onto the image.

        Parameters
        ----------
        values
            ``[num_tokens]``.
        mode
            What a pixel shows of a grid: ``"nearest"`` the cell under its centre, ``"exact"`` the mean of the cells it
            overlaps, weighted by area, ``"bilinear"`` (for display) the interpolation between the centres of cells that
            have a value.

        Returns
        -------
        Tensor
            float64 ``[height, width]``. Grids that overlap (base and tiles, frames of a video) are averaged; NaN where
            no token with a value shows the pixel.
        """
        if mode not in ("bilinear", "nearest", "exact"):
            raise PromptError(f"mode is {mode!r}; choose one of bilinear, nearest, exact")
        values = self._checked(values)
        width, height = self.size
        return _average(_painted(grid, values, (0, 0, width, height), (height, width), mode) for grid in self.grids)

    def grid(self, values: Tensor) -> tuple[Tensor, Box]:
        """
        Values of tokens on one grid.

        Parameters
        ----------
        values
            ``[num_tokens]``.

        Returns
        -------
        values : Tensor
            float64 ``[rows, columns]``: the finest grid, onto which the others are resampled by area and averaged with
            it. NaN for cells of which no token with a value shows anything.
        box : tuple of float
            The rectangle of the original image that it covers.
        """
        values = self._checked(values)
        finest = min(self.grids, key=lambda grid: grid.cell[0] * grid.cell[1])
        rows, columns = finest.index.shape
        return _average(_painted(grid, values, finest.box, (rows, columns), "exact") for grid in self.grids), finest.box

    def stretched(self) -> Geometry:
        """
        The geometry that released code of map-based methods assumes.

        The map of the first grid spread over the whole image, as if nothing had been cropped away or padded.
        """
        width, height = self.size
        return self.only(replace(self.grids[0], box=(0.0, 0.0, float(width), float(height))))

    def only(self, *grids: CellGrid) -> Geometry:
        """Geometry with these grids alone, such as the tiles, or one frame of a video; tokens keep their numbers."""
        return replace(self, grids=grids)

    def cells_in(self, box: Box) -> Tensor:
        """Share of each cell's area inside a box of the original image: float64 ``[num_tokens]``, 0 without a cell."""
        left, top, right, bottom = (float(side) for side in box)
        if not (left < right and top < bottom):
            raise PromptError(f"box is {tuple(box)}; it needs left < right and top < bottom, in pixels of the image")
        cells = self.rectangles()
        width = cells[:, 2].clamp(max=right) - cells[:, 0].clamp(min=left)
        height = cells[:, 3].clamp(max=bottom) - cells[:, 1].clamp(min=top)
        area = (cells[:, 2] - cells[:, 0]) * (cells[:, 3] - cells[:, 1])
        return (width.clamp(min=0) * height.clamp(min=0) / area).nan_to_num(0.0)

    def _checked(self, values: Tensor) -> Tensor:
        if values.shape != (self.num_tokens,):
            raise PromptError(
                f"values has shape {tuple(values.shape)}; one value for each of the image's {self.num_tokens} visual "
                f"tokens is needed"
            )
        return values.detach().to("cpu", torch.float64)


class _Family(Protocol):
    """What geometry asks of the model family; `lmmhooks.family.Family` in practice."""

    def placing(self, tokens: ImageTokens, modality: str, size: Size, processor: Any) -> tuple[CellGrid, ...]: ...


def geometry_of(family: _Family, span: VisualSpan, size: Size, processor: Any) -> Geometry:
    """
    Where the visual tokens of one image lie in the original image.

    Parameters
    ----------
    family
        Of the model.
    span
        The image's tokens, all of them or those that a reduction kept.
    size
        Width and height of the image as it was given to the processor, or of a video's frames.
    processor
        The processor that prepared the image, or its image processor: what it resizes, crops and pads is read off its
        configuration. None where the model sees whole images whatever their size (Qwen, InternVL).

    Raises
    ------
    PromptError
        The model's token grid is not known, the processor is needed and was not given, or the size cannot be that of
        this image.
    """
    width, height = (int(side) for side in size)
    if width < 1 or height < 1:
        raise PromptError(f"size is {tuple(size)}; width and height of the image are 1 pixel or more")
    if not span.tokens.grids:
        raise PromptError(
            f"which part of the {span.modality} a visual token shows is not known for {type(family).__name__}; maps "
            f"work on models with a known token grid (see lmmhooks families)"
        )
    return Geometry((width, height), len(span), family.placing(span.tokens, span.modality, (width, height), processor))


def _painted(grid: CellGrid, values: Tensor, area: Box, shape: tuple[int, int], mode: Mode) -> Tensor:
    """Values of a grid's cells on ``shape`` equal parts of ``area``; NaN where there are none."""
    cells = torch.cat([values, values.new_full((1,), torch.nan)])[grid.index]  # -1 picks the NaN at the end
    seen = ~cells.isnan()
    known = cells.where(seen, 0.0)
    rows, columns = grid.index.shape
    left, top, right, bottom = grid.box

    def resampled(mode: Mode) -> tuple[Tensor, Tensor]:
        down = _weights((area[1], area[3]), shape[0], (top, bottom), rows, mode)
        across = _weights((area[0], area[2]), shape[1], (left, right), columns, mode)
        return down @ known @ across.T, down @ seen.double() @ across.T

    total, weight = resampled(mode)
    # Interpolation must not reach into cells without a value, only be undisturbed by them.
    shown = weight if mode != "bilinear" else resampled("nearest")[1]
    return (total / weight).masked_fill(shown == 0, torch.nan)


def _weights(area: tuple[float, float], parts: int, span: tuple[float, float], cells: int, mode: Mode) -> Tensor:
    """Along one axis, the weight of each of ``cells`` cells over ``span`` in each of ``parts`` parts of ``area``."""
    step = (area[1] - area[0]) / parts
    scale = cells / (span[1] - span[0])
    # In units of cells.
    start = (area[0] + step * torch.arange(parts, dtype=torch.float64)[:, None] - span[0]) * scale
    cell = torch.arange(cells, dtype=torch.float64)[None]
    if mode == "exact":
        stop = start + step * scale
        share = (torch.minimum(stop, cell + 1) - torch.maximum(start, cell)) / (step * scale)
        return share.where(share > _TOUCH, 0.0)
    middle = start + step * scale / 2
    if mode == "nearest":
        return (middle.floor() == cell).double()
    # Beyond the outermost centres the outermost cells go on, as in every resize of an image.
    inside = (middle >= 0) & (middle < cells)
    return (1 - ((middle - 0.5).clamp(0, cells - 1) - cell).abs()).clamp(min=0) * inside


def _average(planes: Any) -> Tensor:
    """Mean of several planes where they have values."""
    total = count = torch.zeros((), dtype=torch.float64)
    for plane in planes:
        seen = ~plane.isnan()
        total, count = total + plane.where(seen, 0.0), count + seen
    return total / count  # 0 / 0 is the NaN of places that nothing shows
