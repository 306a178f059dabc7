"""Everything that differs between the supported transformers versions, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any


def takes_encoder_outputs(model: Any) -> bool:
    """Whether a model's forward takes features that were encoded earlier (5.20 and later), or always encodes itself."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def pixels_argument(modality: str, arguments: Collection[str]) -> str:
    """Name of the encoder argument that holds the pixels; some encoders named a video's like an image's until 5.20."""
    name = {"image": "pixel_values", "video": "pixel_values_videos"}[modality]
    return "pixel_values" if name not in arguments and "pixel_values" in arguments else name


def continuation_arguments(model: Any, vocabulary: int) -> dict[str, int]:
    """What beam search wants to know to choose continuations, beyond what it does in every version."""
    wanted = "vocab_size" in inspect.signature(model._get_top_k_continuations).parameters
    return {"vocab_size": vocabulary} if wanted else {}
