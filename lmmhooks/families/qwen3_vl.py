"""
Qwen3-VL: Qwen2-VL without windows, with deepstack.

Features of early vision layers are added to the hidden states at visual positions after the first decoder layers. Every
frame of a video stands behind its own time stamp, so the tokens of a video are not contiguous.
"""

from __future__ import annotations

from typing import Any, ClassVar

from .qwen2_vl import Qwen2VLFamily

__all__ = ["Qwen3VLFamily"]


class Qwen3VLFamily(Qwen2VLFamily):
    """Qwen3-VL: as many decoder layers receive features as there are entries in ``deepstack_visual_indexes``."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.deepstack_layers = len(self.vision.deepstack_visual_indexes)
