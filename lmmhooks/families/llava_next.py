"""
LLaVA-NeXT: any-resolution images as a base crop and a grid of tiles, unpadded, with a newline token after every row.

Where a token of the packed sequence comes from is not derived a second time: the model's own ``pack_image_features`` is
run on coordinates instead of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from ..errors import PromptError
from ..family import Family
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
