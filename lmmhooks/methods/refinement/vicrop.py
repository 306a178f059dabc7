"""
What the three forms of ViCrop share: the search for a crop on a map of importance, and maps of large images by tiles.

Published in "MLLMs Know Where to Look", ICLR 2025; https://github.com/saccharomycetes/mllms_know. A window of the size
of the encoder's input, or up to twice that, slides over the map cell by cell; of every size the window with the
largest sum is a candidate, and the one that stands out most from its neighbours is the crop. The released code takes a
map to show the whole image, stretched; here a map lies where the model sees it (``geometry='official'`` stretches).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from lmmhooks.geometry import Box, CellGrid, Geometry
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import Look, LookAgain
from lmmhooks.methods.refinement.operators import cropped
from lmmhooks.methods.refinement.saliency import Saliency

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["RATIOS", "LayerViCrop", "ViCrop", "best_crop", "tile_boxes"]

RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
#: Layer that is read, by family, width and depth: the authors' scripts. Elsewhere the same share of the depth.
PUBLISHED = {("llava", 4096, 32): 14, ("qwen2_5_vl", 2048, 36): 22}
SHARE_OF_DEPTH = 14 / 32
#: Base size where the encoder takes images of any size: what the authors' script uses for Qwen2.5-VL.
ANY_SIZE = 224


def best_crop(
    importance: Tensor, size: tuple[int, int], base: float, ratios: Sequence[float] = RATIOS, box: Box | None = None
) -> Box:
    """
    The crop that a map of importance asks for.

    Parameters
    ----------
    importance
        ``[rows, columns]``.
    size
        Width and height of the image.
    base
        Side of the smallest window, in pixels of the image.
    ratios
        Sides that are tried, in multiples of ``base``.
    box
        What the map covers, in pixels of the image; None: all of it.

    Returns
    -------
    tuple of float
        Left, top, right and bottom inside the image, possibly between pixels: a square, but for what the border cuts
        off. All of the image where the smallest window covers the whole map.
    """
    values = importance.double().numpy()
    rows, columns = values.shape
    left, top, right, bottom = box or (0.0, 0.0, float(size[0]), float(size[1]))
    width, height = (right - left) / columns, (bottom - top) / rows
    most, found = -math.inf, None
    for ratio in ratios:
        # Nothing is smaller than a cell; the released code divides by zero there.
        across = max(1, min(int(base * ratio / width), columns))
        down = max(1, min(int(base * ratio / height), rows))
        if across == columns and down == rows:
            if ratio == 1:
                break
            continue
        sums = sliding_window_view(values, (down, across)).sum(axis=(2, 3))
        # The first of equal sums, column after column.
        x, y = divmod(int(sums.T.argmax()), len(sums))
        beside = [
            sums[j, i]
            for i, j in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1))
            if 0 <= i < sums.shape[1] and 0 <= j < sums.shape[0]
        ]
        sharpness = (sums[y, x] - np.mean(beside)) / (across * down)
        if sharpness > most:
            most = sharpness
            found = base * ratio, left + x * width + width * across / 2, top + y * height + height * down / 2
    if found is None:
        return 0.0, 0.0, float(size[0]), float(size[1])
    half = found[0] // 2
    starts, stops = [], []
    for middle, length in zip(found[1:], size, strict=True):
        centre = min(max(int(middle), half), length - half)
        starts.append(float(max(0, centre - half)))
        stops.append(float(min(length, centre + half)))
    return starts[0], starts[1], stops[0], stops[1]


def tile_boxes(size: tuple[int, int], limit: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """
    Tiles of a large image.

    Parameters
    ----------
    size
        Width and height of the image.
    limit
        Height of a tile, in pixels, at most.

    Returns
    -------
    boxes : list
        Left, top, right and bottom of every tile, row by row; the last ones may reach beyond the image.
    columns : int
        Tiles beside one another.
    """
    width, height = size
    rows = math.ceil(height / limit)
    # One column at least: the released code divides by zero for images much higher than wide.
    columns = max(1, int(rows * width / height))
    across, down = math.ceil(width / columns), math.ceil(height / rows)
    return [
        (column * across, row * down, (column + 1) * across, (row + 1) * down)
        for row in range(rows)
        for column in range(columns)
    ], columns


@dataclass(frozen=True)
class ViCrop(LookAgain):
    """Show the part of the image that a map asks for, cut out, beside the image."""

    paper: ClassVar[str] = (
        "MLLMs Know Where to Look: Training-free Perception of Small Visual Details, ICLR 2025, arXiv:2502.17422"
    )
    code: ClassVar[str] = "https://github.com/saccharomycetes/mllms_know"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"high": {"resolution": "high"}}

    base_size: int | None = setting(
        None,
        help="Side of the smallest crop, in pixels of the image, 1 or more; unset: the encoder's input size (336 for "
        "LLaVA-1.5), or 224 where it takes images of any size.",
    )
    ratios: tuple[float, ...] = setting(RATIOS, help="Sides that are tried, in multiples of `base_size`, above 0.")
    resolution: str = setting(
        "model", help="'model': one map of the image as the model sees it; 'high': one per tile, joined (for V*)."
    )
    tile_size: int = setting(1024, help="With 'high': height of a tile in pixels, at most, 1 or more.")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratios", tuple(self.ratios))
        self._require(self.base_size is None or self.base_size >= 1, "base_size", "1 or more, or unset")
        self._require(len(self.ratios) > 0 and min(self.ratios) > 0, "ratios", "numbers above 0, at least one")
        self._require(self.resolution in ("model", "high"), "resolution", "'model' or 'high'")
        self._require(self.tile_size >= 1, "tile_size", "1 or more")

    def bind(self, family: Any) -> ViCrop:
        if self.base_size is not None:
            return self
        side = getattr(family.vision.config, "image_size", None)
        # A pair in some configurations: height and width.
        side = max(side) if isinstance(side, (list, tuple)) else side
        return replace(self, base_size=int(side or ANY_SIZE))

    def importance(self, look: Look) -> Tensor:
        """Importance ``[n]`` of the visual tokens of the image."""
        raise NotImplementedError

    def saliency(self, look: Look) -> Saliency:
        boxes, columns = tile_boxes(look.image.size, self.tile_size)
        if self.resolution == "model" or len(boxes) == 1:
            return self._placed(look, self.importance(look))
        tiles = []
        for box in boxes:
            tile = look.at(look.image.crop(box))
            tiles.append(_evenly(self._placed(tile, self.importance(tile))))
        joined = torch.cat([torch.cat(tiles[i : i + columns], dim=1) for i in range(0, len(tiles), columns)])
        width, height = look.image.size
        # The released code takes tiles to end where the image does.
        right, bottom = boxes[-1][2:] if self.geometry == "true" else (width, height)
        cells = torch.arange(joined.numel()).reshape(joined.shape)
        grid = CellGrid(cells, (0.0, 0.0, float(right), float(bottom)), "tiles")
        return Saliency(joined.flatten(), Geometry((width, height), joined.numel(), (grid,)))

    def refined(self, image: Image, saliency: Saliency) -> Image:
        assert self.base_size is not None, "filled in by bind"
        grid, box = saliency.grid()
        return cropped(image, best_crop(grid, image.size, self.base_size, self.ratios, box))


@dataclass(frozen=True)
class LayerViCrop(ViCrop):
    """Takes its map from one decoder layer."""

    layer: int | None = setting(
        None, help="Decoder layer that is read, 0-based; unset: the authors' (14 of 32), elsewhere that share of depth."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.layer is None or self.layer >= 0, "layer", "0 or more, or unset")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        layer = PUBLISHED.get((family.name, family.hidden_size, family.num_layers))
        return {} if layer is None else {"layer": layer}

    def check(self, family: Any) -> None:
        inside = self.layer is None or self.layer < family.num_layers
        self._require(inside, "layer", f"a layer of this model, 0 to {family.num_layers - 1}")

    def bind(self, family: Any) -> ViCrop:
        return replace(super().bind(family), layer=self._layer(family))  # type: ignore[call-arg]

    def _layer(self, family: Any) -> int:
        return round(family.num_layers * SHARE_OF_DEPTH) if self.layer is None else self.layer


def _evenly(saliency: Saliency) -> Tensor:
    """The map of a tile on a grid over the tile, whatever part of it the model sees; 0 where it sees nothing."""
    grid, box = saliency.grid()
    if box == (0.0, 0.0, float(saliency.size[0]), float(saliency.size[1])):
        return grid
    plane = saliency.geometry.plane(saliency.values, "exact").nan_to_num(nan=0.0)
    return torch.nn.functional.interpolate(plane[None, None], tuple(grid.shape), mode="area")[0, 0]
