"""
LLaVA-OneVision: any-resolution images like LLaVA-NeXT, large mosaics interpolated down, video frames pooled by two.

Images are tiled only where they are alone in their prompt (``batch_num_images``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import PromptError
from ..geometry import CellGrid, Size
from ..placing import image_processor_of, shown, shown_of_square, whole
from ..vision import ImageTokens, VisionInputs
from .llava_next import LlavaNextFamily

__all__ = ["LlavaOnevisionFamily"]


class LlavaOnevisionFamily(LlavaNextFamily):
    """LLaVA-OneVision: a token of an interpolated mosaic gets the cell nearest to where it was sampled."""

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    #: Mosaics are interpolated and videos pooled after the projector: a token may stand for several patches.
    projects_patches: ClassVar[bool] = False
    #: An image is tiled only where it is alone.
    encodes_images_alone: ClassVar[bool] = False

    @property
    def _pooled_side(self) -> int:
        """Side of the token grid of a video frame."""
        return -(-self._side // 2)

    def crops_of(self, vision: VisionInputs) -> list[int]:
        if vision.modality == "video":
            videos, frames = vision.kwargs[vision.pixels_name].shape[:2]
            return [frames] * videos
        crops = super().crops_of(vision)
        if vision.kwargs.get("batch_num_images") is None:
            return crops
        alone = [count == 1 for count in vision.host("batch_num_images") for _ in range(count)]
        return [num if single else 1 for num, single in zip(crops, alone, strict=True)]

    def token_counts(self, vision: VisionInputs) -> list[int]:
        counts = super().token_counts(vision)
        if vision.modality == "image":
            return counts
        # Before 5.20, the newline of a video is appended by forward, not by the encoder.
        per_frame = self._pooled_side**2
        return [count + (count % per_frame == 0) for count in counts]

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens:
        if vision.modality == "image":
            return super().image_tokens(vision, source, num_tokens)
        side = self._pooled_side
        num_frames, newlines = divmod(num_tokens, side**2)
        if newlines != 1:
            raise PromptError(
                f"video {source} has {num_tokens} tokens in the prompt, which is not one more than a multiple of "
                f"{side} x {side}; build the prompt with the processor of this model"
            )
        frames = ImageTokens.raster([(side, side)] * num_frames)
        newline = torch.tensor([-1])
        crop, row, col = (torch.cat([part, newline]) for part in (frames.crop, frames.row, frames.col))
        return ImageTokens(crop, row, col, frames.grids)

    def placing(self, tokens: ImageTokens, modality: str, size: Size, processor: Any) -> tuple[CellGrid, ...]:
        if tokens.tiling is not None:
            return super().placing(tokens, modality, size, processor)
        # One of several images is padded to a square; frames are stretched.
        part = shown_of_square if modality == "image" else shown
        return whole(tokens, modality, part(image_processor_of(processor, modality), size, self._patch))

    def tower_to_tokens(self, per_patch: Sequence[Tensor], vision: VisionInputs) -> list[Tensor]:
        if vision.modality == "image":
            return super().tower_to_tokens(per_patch, vision)
        pooled = self.core.apply_pooling(torch.cat(list(per_patch)).float())
        newline = pooled.new_full((1, pooled.shape[-1]), float("nan"))
        return [torch.cat([video.flatten(0, 1), newline]) for video in pooled.split(self.crops_of(vision))]

    def _pack(
        self, images: list[Tensor], vision: VisionInputs, sources: Sequence[int], newline: Tensor
    ) -> Sequence[Tensor]:
        sizes = vision.host("image_sizes")
        aspect = vision.kwargs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        return self.core.pack_image_features(
            images, [sizes[i] for i in sources], image_newline=newline, vision_aspect_ratio=aspect
        )[0]
