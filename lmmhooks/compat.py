"""Everything that differs between the supported transformers versions, in one place."""

from __future__ import annotations

import inspect
from typing import Any


def takes_encoder_outputs(model: Any) -> bool:
    """Whether a model's forward takes features that were encoded earlier (5.20 and later), or always encodes itself."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters
