"""
Qwen2.5-VL: Qwen2-VL with window attention in most vision layers.

The tower permutes merge groups so that windows are contiguous, and undoes it after the merger. Only the layers of
``fullatt_block_indexes`` (7, 15, 23, 31 in the released models) see a whole image.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from ..vision import VisionInputs
from .qwen2_vl import Qwen2VLFamily

__all__ = ["Qwen2_5_VLFamily"]


class Qwen2_5_VLFamily(Qwen2VLFamily):
    """Qwen2.5-VL: window order in the tower, raster order in the prompt."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.full_attention_vision_layers = tuple(sorted(self.vision.fullatt_block_indexes))
        self.window_attention = True

    def _raster(self, merged: Tensor, vision: VisionInputs) -> Tensor:
        tower = self.vision
        window_index, _ = get_vision_window_index(
            vision.kwargs[f"{vision.modality}_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return merged[window_index.argsort().to(merged.device)]
