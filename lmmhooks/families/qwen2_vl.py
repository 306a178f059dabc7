"""
Qwen2-VL: patches of any resolution packed into one sequence, 2x2 merged in the tower, M-RoPE positions.

The tower's rows are ordered by merge group, so that the patches of one visual token are consecutive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PromptError
from ..family import Family
from ..vision import ImageTokens, VisionInputs

__all__ = ["Qwen2VLFamily"]


class Qwen2VLFamily(Family):
    """Qwen2-VL: every temporal patch of an image or video is a crop of ``(height / merge, width / merge)`` tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)

    def _grids(self, vision: VisionInputs) -> list[tuple[int, int, int]]:
        """``(frames, rows, columns)`` in tokens of every image of a call."""
        merge = self.vision.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in vision.host(f"{vision.modality}_grid_thw")]

    def crops_of(self, vision: VisionInputs) -> list[int]:
        return [frames for frames, _, _ in self._grids(vision)]

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens:
        frames, rows, cols = self._grids(vision)[source]
        if frames * rows * cols != num_tokens:
            raise PromptError(
                f"{vision.modality} {source} has {num_tokens} tokens in the prompt, but its grid {frames} x {rows} x "
                f"{cols} gives {frames * rows * cols}; build the prompt with the processor of this model"
            )
        return ImageTokens.raster([(rows, cols)] * frames)

    def tower_to_tokens(self, per_patch: Sequence[Tensor], vision: VisionInputs) -> list[Tensor]:
        merged = torch.cat(list(per_patch)).unflatten(0, (-1, self.vision.spatial_merge_size**2)).mean(dim=1)
        return list(self._raster(merged, vision).split([t * h * w for t, h, w in self._grids(vision)]))

    def _raster(self, merged: Tensor, vision: VisionInputs) -> Tensor:
        """Merged scores ``[tokens]`` from tower order to the order in which the merger hands them out."""
        return merged
