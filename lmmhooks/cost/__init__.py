"""
The theoretical cost model: what a reduction should save, against which measured speed is held.

Pure arithmetic on shapes and token counts; nothing here imports torch. One multiply-add is one MAC and two FLOPs.
"""

from __future__ import annotations

from lmmhooks.cost.budget import average_visual, solve_cut, solve_staged, visual_schedule
from lmmhooks.cost.decoder import (
    DecoderShape,
    LayerCounts,
    Pairs,
    attention_map_bytes,
    decode_macs,
    dense_counts,
    kv_bytes,
    layer_macs,
    literature_macs,
    prefill_macs,
    score_macs,
)
from lmmhooks.cost.latency import Device, calibrate_compute, decode_seconds, prefill_seconds
from lmmhooks.cost.memory import PromptMemory, prompt_memory
from lmmhooks.cost.vision import VisionShape, projector_macs, vision_macs

__all__ = [
    "DecoderShape",
    "Device",
    "LayerCounts",
    "Pairs",
    "PromptMemory",
    "VisionShape",
    "attention_map_bytes",
    "average_visual",
    "calibrate_compute",
    "decode_macs",
    "decode_seconds",
    "dense_counts",
    "kv_bytes",
    "layer_macs",
    "literature_macs",
    "prefill_macs",
    "prefill_seconds",
    "projector_macs",
    "prompt_memory",
    "score_macs",
    "solve_cut",
    "solve_staged",
    "vision_macs",
    "visual_schedule",
]
