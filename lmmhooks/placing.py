"""
Which part of the original image the crops of a model show.

What an image processor does to an image (resize, crop, pad) is read off its configuration, and sizes are computed by
the functions of transformers that the processors themselves use. Families override `Placing.placing` where images are
cut up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import PromptError
from .geometry import Box, CellGrid, Size
from .vision import ImageTokens

__all__ = [
    "Placing",
    "cells_of",
    "image_processor_of",
    "in_mosaic",
    "shown",
    "shown_of_square",
    "shown_stretched",
    "view_of",
    "whole",
]


class Placing:
    """Base of `lmmhooks.family.Family`: where the tokens of an image lie in the original one."""

    vision: Any

    def placing(self, tokens: ImageTokens, modality: str, size: Size, processor: Any) -> tuple[CellGrid, ...]:
        """
        Grids of cells over the original image.

        Parameters
        ----------
        tokens
            Of one image, with known grids; a reduction may have removed some.
        modality
            ``"image"`` or ``"video"``.
        size
            Width and height of the original image.
        processor
            The processor that prepared it, its image processor, or None.

        Raises
        ------
        PromptError
            The processor is needed and missing, or what it does to images is not known.
        """
        prepare = image_processor_of(processor, modality)
        _require_standard(prepare)
        return whole(tokens, modality, shown(prepare, size, self._patch))

    @property
    def _patch(self) -> int:
        """Pixels along one side of the tower's patches; a remainder of the crop that fills none is never seen."""
        return int(self.vision.config.patch_size)


def whole(tokens: ImageTokens, modality: str, box: Box) -> tuple[CellGrid, ...]:
    """One grid over ``box``, or one per frame of a video."""
    kind = "frame" if modality == "video" else "image"
    return tuple(CellGrid(cells_of(tokens, crop), box, kind) for crop in range(len(tokens.grids)))


def cells_of(tokens: ImageTokens, crop: int) -> Tensor:
    """Numbers of the tokens that show the cells of one crop: long ``[rows, columns]``, -1 for none."""
    index = torch.full(tokens.grids[crop], -1)
    (there,) = (tokens.crop == crop).nonzero(as_tuple=True)
    index[tokens.row[there], tokens.col[there]] = there
    return index


def in_mosaic(tokens: ImageTokens, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Tokens of the tiles of one image, as cells of all tiles put together.

    Parameters
    ----------
    tokens
        With a tiling.
    columns
        Tiles side by side.

    Returns
    -------
    number, row, column : Tensor
        Long ``[n]`` each: which of the image's tokens, and where it stands in the mosaic.
    """
    assert tokens.tiling is not None
    (number,) = ((tokens.crop >= 0) & (tokens.crop != tokens.tiling.overview)).nonzero(as_tuple=True)
    crop = tokens.crop[number]
    tile = crop - (crop > tokens.tiling.overview).long()
    rows_per_tile, columns_per_tile = tokens.grids[tokens.tiling.tiles[0]]
    row = tile // columns * rows_per_tile + tokens.row[number]
    column = tile % columns * columns_per_tile + tokens.col[number]
    return number, row, column


def image_processor_of(processor: Any, modality: str) -> Any:
    """The part of a processor that prepares images (or videos); it may be handed in itself."""
    if processor is None:
        raise PromptError(
            "what this model sees of an image depends on how the processor resizes and crops it; pass processor=..."
        )
    name = f"{modality}_processor"
    part = getattr(processor, name, processor)
    if part is None:
        raise PromptError(f"this {type(processor).__name__} has no {name}, so it cannot have prepared a {modality}")
    return part


def shown(prepare: Any, size: Size, patch: int) -> Box:
    """
    The part of an image that remains after the standard preparation: resize, then crop the centre.

    Parameters
    ----------
    prepare
        Image processor.
    size
        Width and height of the image.
    patch
        Patches are cut from the upper left; what is left over at the other sides is not seen.

    Returns
    -------
    tuple of float
        Its sides in pixels of the image; beyond it where a small image was padded to the size of the crop.
    """
    resized = _resized(prepare, size)
    crop = resized
    if getattr(prepare, "do_center_crop", False):
        crop = prepare.crop_size["width"], prepare.crop_size["height"]
    sides = []
    for given, now, kept in zip(size, resized, crop, strict=True):
        # Odd padding goes before the image in the PIL backend, and behind it in the torchvision one.
        start = int((now - kept) / 2) if getattr(prepare, "backend", "pil") == "torchvision" else (now - kept) // 2
        scale = given / now
        sides.append((start * scale, (start + kept // patch * patch) * scale))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def shown_of_square(prepare: Any, size: Size, patch: int) -> Box:
    """Like `shown`, of an image that is padded to a square around its centre first."""
    side = max(size)
    before_x, before_y = ((side - given) // 2 for given in size)
    left, top, right, bottom = shown(prepare, (side, side), patch)
    return left - before_x, top - before_y, right - before_x, bottom - before_y


def shown_stretched(prepare: Any, size: Size, patch: int) -> Box:
    """Like `shown`, of an image that is resized without its aspect first, to the size the processor is set to."""
    wanted: dict[str, int] = dict(prepare.size)
    edge = wanted.get("shortest_edge", 0)
    first = wanted.get("width", edge), wanted.get("height", edge)
    left, top, right, bottom = shown(prepare, first, patch)
    across, down = (given / now for given, now in zip(size, first, strict=True))
    return left * across, top * down, right * across, bottom * down


def view_of(size: Size) -> np.ndarray:
    """An image ``[3, height, width]`` without memory, for functions that want only its size."""
    width, height = size
    return np.broadcast_to(np.uint8(0), (3, height, width))


def _resized(prepare: Any, size: Size) -> Size:
    """Width and height after the resizing of the base image processor."""
    from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
    from transformers.image_utils import ChannelDimension

    if not getattr(prepare, "do_resize", True):
        return size
    wanted = {key: value for key, value in dict(prepare.size).items() if value}
    width, height = size
    if set(wanted) == {"shortest_edge", "longest_edge"}:
        height, width = get_size_with_aspect_ratio((height, width), wanted["shortest_edge"], wanted["longest_edge"])
    elif set(wanted) == {"shortest_edge"}:
        height, width = get_resize_output_image_size(
            view_of(size),
            size=wanted["shortest_edge"],
            default_to_square=False,
            input_data_format=ChannelDimension.FIRST,
        )
    elif set(wanted) == {"height", "width"}:
        height, width = wanted["height"], wanted["width"]
    else:
        raise PromptError(
            f"size of {type(prepare).__name__} is {wanted}; where its cells lie is known for shortest_edge, "
            f"shortest_edge with longest_edge, and height with width"
        )
    return width, height


def _require_standard(prepare: Any) -> None:
    """Refuse image processors with steps of their own, which may cut images up in ways that are not known here."""
    for name in ("_preprocess", "resize", "center_crop"):
        owner = next((base for base in type(prepare).__mro__ if name in vars(base)), None)
        if owner is None or not owner.__module__.startswith(("transformers.image_", "transformers.video_")):
            raise _unknown(prepare, f"has a {name} of its own")
    if getattr(prepare, "do_pad", False):
        raise _unknown(prepare, "pads images")


def _unknown(prepare: Any, reason: str) -> PromptError:
    return PromptError(
        f"where the visual tokens of this model lie is not known: its {type(prepare).__name__} {reason}; "
        f"add a family with placing()"
    )
