"""
LLaVA 1.5 and models of the same class: one square crop per image, CLIP with CLS, a projector.

With a Pixtral tower the image keeps its aspect ratio, and all images of a call are packed into one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import PromptError
from ..family import Family
from ..geometry import CellGrid, Size
from ..placing import image_processor_of, shown, shown_of_square, whole
from ..vision import ImageTokens, VisionInputs

__all__ = ["LlavaFamily"]


class LlavaFamily(Family):
    """LLaVA 1.5: ``(image_size / patch_size)`` squared tokens per image in raster order."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    projects_patches: ClassVar[bool] = True

    @property
    def tokens_per_image(self) -> int | None:
        config = self.vision.config
        # Pixtral towers keep the aspect ratio; the others have a class token or a fixed grid.
        if config.model_type == "pixtral":
            return None
        return (config.image_size // config.patch_size) ** 2

    def _grid(self, vision: VisionInputs, source: int) -> tuple[int, int]:
        config = self.vision.config
        if vision.kwargs.get("image_sizes") is not None:
            height, width = vision.host("image_sizes")[source]
        else:
            height = width = config.image_size
        return height // config.patch_size, width // config.patch_size

    def _keeps_cls(self, vision: VisionInputs) -> bool:
        strategy = vision.kwargs.get("vision_feature_select_strategy")
        if strategy is None:
            strategy = getattr(self.model.config, "vision_feature_select_strategy", "default")
        return self.has_cls and strategy == "full"

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens:
        rows, cols = self._grid(vision, source)
        tokens = ImageTokens.raster([(rows, cols)])
        if self._keeps_cls(vision):
            nowhere = torch.tensor([-1])
            tokens = ImageTokens(
                torch.cat([nowhere, tokens.crop]),
                torch.cat([nowhere, tokens.row]),
                torch.cat([nowhere, tokens.col]),
                tokens.grids,
            )
        if len(tokens) != num_tokens:
            raise PromptError(
                f"image {source} has {num_tokens} tokens in the prompt, but its grid of {rows} x {cols} gives "
                f"{len(tokens)}; build the prompt with the processor of this model"
            )
        return tokens

    def placing(self, tokens: ImageTokens, modality: str, size: Size, processor: Any) -> tuple[CellGrid, ...]:
        if self.tokens_per_image is None:
            # Pixtral: resized to a whole number of patches, nothing is cut off.
            width, height = size
            return whole(tokens, modality, (0.0, 0.0, float(width), float(height)))
        prepare = image_processor_of(processor, modality)
        # Of the processors that checkpoints of this family come with, only LLaVA's own pads, and it pads first.
        padded = getattr(prepare, "do_pad", False) and hasattr(prepare, "pad_to_square")
        return whole(tokens, modality, (shown_of_square if padded else shown)(prepare, size, self._patch))

    def tower_to_tokens(self, per_patch: Sequence[Tensor], vision: VisionInputs) -> list[Tensor]:
        features = torch.cat(list(per_patch))
        if vision.kwargs.get("image_sizes") is not None:
            sizes = [rows * cols for rows, cols in (self._grid(vision, i) for i in range(vision.num_images))]
            return list(features.flatten(0, 1).split(sizes))
        if self._keeps_cls(vision):
            features = torch.nn.functional.pad(features, (0, 0, 1, 0), value=float("nan"))
        return list(features)

    def unpack_pixels(self, vision: VisionInputs) -> list[Tensor]:
        images = super().unpack_pixels(vision)
        if vision.kwargs.get("image_sizes") is None:
            return images
        # Pixtral: images of different sizes are padded to the largest one of the call.
        sizes = vision.host("image_sizes")
        return [image[..., :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]

    def pack_pixels(self, images: Sequence[Tensor], vision: VisionInputs) -> Tensor:
        if vision.kwargs.get("image_sizes") is None:
            return super().pack_pixels(images, vision)
        pixels = vision.kwargs["pixel_values"].clone()
        for slot, image in zip(pixels, images, strict=True):
            slot[:, : image.shape[-2], : image.shape[-1]] = image[0]
        return pixels
