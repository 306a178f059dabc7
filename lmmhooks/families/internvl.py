"""
InternVL: an image is a run of square tiles, the thumbnail last; pixel shuffle merges the patches of a tile.

The encoder sees tiles only; which of them form one image shows in the prompt, where the tokens of an image are
contiguous and images are set apart by their begin and end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from ..errors import PromptError
from ..family import Family
from ..geometry import CellGrid, Size
from ..placing import cells_of, in_mosaic, whole
from ..vision import ImageTokens, Tiling, VisionInputs

__all__ = ["InternVLFamily"]


class InternVLFamily(Family):
    """InternVL: a crop is a tile; two images without anything between their tokens count as one."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    has_tiles: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = self.vision.config
        self._side = config.image_size[0] // config.patch_size[0]
        self._token_side = int(self._side * model.config.downsample_ratio)

    @property
    def patches_per_side(self) -> int:
        return self._side // self._token_side

    def group_entries(self, positions: Sequence[Tensor]) -> list[int]:
        sizes: list[int] = []
        end = None
        for tile in positions:
            if end is not None and int(tile[0]) == end:
                sizes[-1] += 1
            else:
                sizes.append(1)
            end = int(tile[-1]) + 1
        return sizes

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens:
        side = self._token_side
        tiles, rest = divmod(num_tokens, side**2)
        if rest:
            raise PromptError(
                f"image {source} has {num_tokens} tokens in the prompt, no multiple of the {side} x {side} tokens of a "
                f"tile; build the prompt with the processor of this model"
            )
        tokens = ImageTokens.raster([(side, side)] * tiles)
        # By convention of the processor: the thumbnail comes last, and only where there are several tiles.
        return replace(tokens, tiling=Tiling(tiles - 1, tiles - 1)) if tiles > 1 else tokens

    def placing(self, tokens: ImageTokens, modality: str, size: Size, processor: Any) -> tuple[CellGrid, ...]:
        width, height = size
        everything = (0.0, 0.0, float(width), float(height))
        if tokens.tiling is None:
            return whole(tokens, modality, everything)
        # The image is stretched over the canvas whose aspect is nearest to its own. Among canvases of as many tiles as
        # there are, that is the same one, whatever numbers of tiles the processor was allowed.
        num = tokens.tiling.num_tiles
        columns, rows = get_optimal_tiled_canvas((height, width), tuple(self.vision.config.image_size), num, num)
        index = torch.full((rows * self._token_side, columns * self._token_side), -1)
        number, row, column = in_mosaic(tokens, columns)
        index[row, column] = number
        return (
            CellGrid(index, everything, "tiles"),
            CellGrid(cells_of(tokens, tokens.tiling.overview), everything, "thumbnail"),
        )

    def tower_to_tokens(self, per_patch: Sequence[Tensor], vision: VisionInputs) -> list[Tensor]:
        features = torch.cat(list(per_patch))
        tiles = features.reshape(-1, self._side, self._side, features.shape[-1])
        # The model's own shuffle puts the patches of a token side by side in the last dimension.
        shuffled = self.core.pixel_shuffle(tiles, scale_factor=self.model.config.downsample_ratio)
        tokens = shuffled.unflatten(-1, (-1, features.shape[-1])).mean(dim=-2).flatten(1, 2)
        return [image.flatten(0, 1) for image in tokens.split(self.crops_of(vision))]
