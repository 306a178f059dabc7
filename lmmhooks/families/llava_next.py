"""
LLaVA-NeXT: any-resolution images as a base crop and a grid of tiles, unpadded, with a newline token after every row.

Where a token of the packed sequence comes from is not derived a second time: the model's own ``pack_image_features`` is
run on coordinates instead of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from ..errors import PromptError
from ..family import Family
from ..geometry import CellGrid, Size
from ..placing import cells_of, image_processor_of, in_mosaic, shown, shown_stretched, view_of, whole
from ..vision import ImageTokens, Tiling, VisionInputs

__all__ = ["LlavaNextFamily"]


class LlavaNextFamily(Family):
    """LLaVA-NeXT: crop 0 is the base, crop ``1 + i`` the tile i in raster order; newline tokens have no place."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    projects_patches: ClassVar[bool] = True
    has_tiles: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = self.vision.config
        self._side = config.image_size // config.patch_size

    def crops_of(self, vision: VisionInputs) -> list[int]:
        pinpoints, tile = self.model.config.image_grid_pinpoints, self.vision.config.image_size
        return [image_size_to_num_patches(size, pinpoints, tile) for size in vision.host("image_sizes")]

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens:
        if "image_sizes" not in vision.kwargs:
            return ImageTokens.unknown(num_tokens)
        side = self._side
        crops = self.crops_of(vision)[source]
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1)
        tile_rows = tile_columns = 1
        # Per patch: is it of a tile, and its row and column; tiles count rows and columns through the whole mosaic, so
        # that packing may also interpolate between them. Doubles keep interpolated halves exact enough to round.
        patches = torch.zeros(crops, side, side, 3, dtype=torch.float64)
        patches[..., 1:] = grid
        if crops > 1:
            pinpoints, tile_size = self.model.config.image_grid_pinpoints, self.vision.config.image_size
            size = vision.host("image_sizes")[source]
            tile_rows, tile_columns = get_anyres_image_grid_shape(size, pinpoints, tile_size)
            tiles = torch.stack(
                torch.meshgrid(torch.arange(tile_rows), torch.arange(tile_columns), indexing="ij"), dim=-1
            ).flatten(0, 1)
            patches[1:, ..., 0] = 1
            patches[1:, ..., 1:] += side * tiles[:, None, None]
        newline = torch.full((3,), -1.0, dtype=torch.float64)
        packed = self._pack([patches.flatten(1, 2)], vision, [source], newline)[0]
        if len(packed) != num_tokens:
            raise PromptError(
                f"image {source} has {num_tokens} tokens in the prompt, but its size gives {len(packed)}; "
                f"build the prompt with the processor of this model"
            )
        # Nearest cell, a tie going to the upper left one.
        of_tile, y, x = (packed - 0.5 - 1e-6).ceil().long().unbind(dim=1)
        newlines = of_tile < 0
        crop = torch.where(of_tile == 1, 1 + y // side * tile_columns + x // side, 0)
        tiling = Tiling(0, crops - 1, (tile_rows, tile_columns)) if crops > 1 else None
        return ImageTokens(
            crop.masked_fill(newlines, -1),
            (y % side).masked_fill(newlines, -1),
            (x % side).masked_fill(newlines, -1),
            ((side, side),) * crops,
            tiling,
        )

    def placing(self, tokens: ImageTokens, modality: str, size: Size, processor: Any) -> tuple[CellGrid, ...]:
        prepare = image_processor_of(processor, modality)
        everything = shown_stretched(prepare, size, self._patch)
        if tokens.tiling is None:
            return whole(tokens, modality, everything)
        base = CellGrid(cells_of(tokens, 0), everything, "base")
        tiles = self._tiles(tokens, size, prepare)
        return (base, tiles) if tiles.index.numel() else (base,)

    def _tiles(self, tokens: ImageTokens, size: Size, prepare: Any) -> CellGrid:
        """
        The tiles of an image as one grid: as large as what packing left of them, over the part of the image it shows.

        Packing treats patches of all tiles as evenly spaced, and so does this. Where a tile is no whole number of
        patches (384 pixels and patches of 14), they truly lie up to the remainder nearer to the tile's upper left.
        """
        width, height = size
        tile, side = self.vision.config.image_size, self._side
        tile_rows, tile_columns = grid = get_anyres_image_grid_shape(
            (height, width), self.model.config.image_grid_pinpoints, tile
        )
        if tokens.tiling is None or tuple(grid) != tokens.tiling.grid:
            raise PromptError(
                f"an image of {width} x {height} pixels has {tile_rows} x {tile_columns} tiles, but the prompt was "
                f"built from another one; pass the size of the image that was given to the processor"
            )
        if shown(prepare, (tile, tile), 1) != (0, 0, tile, tile):
            raise PromptError(
                f"{type(prepare).__name__} resizes or crops tiles of {tile} pixels again, so they do not join; set its "
                f"size and crop_size to {tile}"
            )
        # What the model's own packing makes of an image of this size: how many rows, each with a newline at its end ...
        call = VisionInputs("image", {"image_sizes": [[height, width]]}, SimpleNamespace(pooler_output=[]))
        patches = torch.zeros(1 + tile_rows * tile_columns, side**2, 1)
        packed = self._pack([patches], call, [0], torch.full((1,), -1.0))[0][side**2 :]
        rows = int((packed < 0).sum())
        columns = len(packed) // max(rows, 1) - 1 if rows else 0
        # ... and how many patches that stands for, the same number being cut off at opposite sides.
        mosaic = torch.empty(1, tile_rows * side, tile_columns * side)
        remaining = unpad_image(mosaic, (height, width)).shape[1:]
        cut = [(full - kept) // 2 for full, kept in zip(mosaic.shape[1:], remaining, strict=True)]
        index = torch.full((rows, columns), -1)
        number, *place = in_mosaic(tokens, tile_columns)
        # The cell whose middle is nearest: tokens of an interpolated mosaic know only the patch next to their middle.
        row, column = (
            (2 * (patch - before) + 1) * cells // (2 * kept)
            for patch, before, cells, kept in zip(place, cut, index.shape, remaining, strict=True)
        )
        index[row, column] = number

        target = tile_rows * tile, tile_columns * tile
        resized = get_patch_output_size(view_of(size), target, ChannelDimension.FIRST)
        sides = []
        for given, now, full, before, kept in zip((height, width), resized, target, cut, remaining, strict=True):
            scale, pad, pitch = given / now, (full - now) // 2, tile / side
            sides.append(((before * pitch - pad) * scale, ((before + kept) * pitch - pad) * scale))
        (top, bottom), (first, last) = sides
        return CellGrid(index, (first, top, last, bottom), "tiles")

    def tower_to_tokens(self, per_patch: Sequence[Tensor], vision: VisionInputs) -> list[Tensor]:
        # Readings travel through the packing like features: where it interpolates features, it interpolates them too.
        features = torch.cat(list(per_patch)).float()
        images = list(features.split(self.crops_of(vision)))
        newline = features.new_full((features.shape[-1],), float("nan"))
        return list(self._pack(images, vision, range(len(images)), newline))

    def unpack_pixels(self, vision: VisionInputs) -> list[Tensor]:
        pixels = vision.kwargs[vision.pixels_name]
        crops = self.crops_of(vision)
        if pixels.ndim == 4:
            return list(pixels.split(crops))
        # Images with fewer crops are padded to the most of the call.
        return [image[:num] for image, num in zip(pixels, crops, strict=True)]

    def pack_pixels(self, images: Sequence[Tensor], vision: VisionInputs) -> Tensor:
        pixels = vision.kwargs[vision.pixels_name]
        if pixels.ndim == 4:
            return torch.cat(list(images))
        pixels = pixels.clone()
        for slot, image in zip(pixels, images, strict=True):
            slot[: len(image)] = image
        return pixels

    def _pack(
        self, images: list[Tensor], vision: VisionInputs, sources: Sequence[int], newline: Tensor
    ) -> Sequence[Tensor]:
        """The model's packing of features ``[crops, patches, width]`` into ``[tokens, width]``, image by image."""
        sizes = vision.host("image_sizes")
        # The strategy only words a warning here: CLS is gone by the time features are packed.
        return self.core.pack_image_features(
            images, [sizes[i] for i in sources], vision_feature_select_strategy="full", image_newline=newline
        )[0]
