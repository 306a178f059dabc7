"""
Named architecture shapes: real transformers models with random weights, so that speed is measured with no download.

Time and memory do not depend on what the weights say. A shape has the widths of a public checkpoint; its depth may be
scaled down (`layers`), which leaves every per-layer ratio as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from lmmhooks.errors import LmmhooksError, closest

__all__ = ["SHAPES", "NamedShape", "build_config", "build_model", "shape"]


@dataclass(frozen=True)
class NamedShape:
    """
    Sizes of a public checkpoint.

    Parameters
    ----------
    name
        What the command line calls it.
    source
        The checkpoint whose configuration the sizes are taken from.
    model_type
        The transformers model type.
    text, vision
        Fields of the text and the vision config.
    extra
        Fields of the multimodal config itself.
    """

    name: str
    source: str
    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)


def _llama(width: int, ffn: int, layers: int, heads: int, vocabulary: int = 32064) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
    }


def _qwen2(width: int, ffn: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
    }


def _qwen2_mrope(*sizes: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    return {**_qwen2(*sizes), "rope_parameters": rope}


_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP_SO400M_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN2_5_VIT = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
_INTERN_VIT_300M = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}

SHAPES: dict[str, NamedShape] = {
    entry.name: entry
    for entry in (
        NamedShape("llava-1.5-7b-shape", "llava-hf/llava-1.5-7b-hf", "llava", _llama(4096, 11008, 32, 32), _CLIP_L_336),
        NamedShape(
            "llava-1.5-13b-shape", "llava-hf/llava-1.5-13b-hf", "llava", _llama(5120, 13824, 40, 40), _CLIP_L_336
        ),
        NamedShape(
            "llava-next-7b-shape",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            "llava_next",
            _llama(4096, 11008, 32, 32),
            _CLIP_L_336,
        ),
        NamedShape(
            "llava-onevision-7b-shape",
            "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            "llava_onevision",
            {"model_type": "qwen2", **_qwen2(3584, 18944, 28, 28, 4, 152128)},
            _SIGLIP_SO400M_384,
        ),
        NamedShape(
            "qwen2-vl-7b-shape",
            "Qwen/Qwen2-VL-7B-Instruct",
            "qwen2_vl",
            _qwen2_mrope(3584, 18944, 28, 28, 4, 152064),
            {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
        ),
        NamedShape(
            "qwen2.5-vl-3b-shape",
            "Qwen/Qwen2.5-VL-3B-Instruct",
            "qwen2_5_vl",
            _qwen2_mrope(2048, 11008, 36, 16, 2, 151936),
            {**_QWEN2_5_VIT, "out_hidden_size": 2048},
            {"tie_word_embeddings": True},
        ),
        NamedShape(
            "qwen2.5-vl-7b-shape",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "qwen2_5_vl",
            _qwen2_mrope(3584, 18944, 28, 28, 4, 152064),
            {**_QWEN2_5_VIT, "out_hidden_size": 3584},
        ),
        NamedShape(
            "qwen3-vl-8b-shape",
            "Qwen/Qwen3-VL-8B-Instruct",
            "qwen3_vl",
            {
                **_qwen2(4096, 12288, 36, 32, 8, 151936),
                "head_dim": 128,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5000000.0,
                    "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            },
            {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
        ),
        NamedShape(
            "internvl3-8b-shape",
            "OpenGVLab/InternVL3-8B-hf",
            "internvl",
            {"model_type": "qwen2", **_qwen2(3584, 18944, 28, 28, 4, 151674)},
            _INTERN_VIT_300M,
            {"tie_word_embeddings": False},
        ),
        NamedShape(
            "test-shape",
            "none: small enough for tests of the benchmark itself; its figures mean nothing",
            "llava",
            _llama(64, 128, 4, 4, vocabulary=32064),
            {
                **_CLIP_L_336,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            }
            | {"image_size": 112},
            {"image_seq_length": 64},
        ),
    )
}


def shape(name: str) -> NamedShape:
    """
    Look a shape up by name.

    Raises
    ------
    LmmhooksError
        No such shape; the message lists them.
    """
    if name not in SHAPES:
        raise LmmhooksError(f"no shape {name!r}{closest(name, SHAPES)} Shapes: {', '.join(SHAPES)}")
    return SHAPES[name]


def build_config(name: str, layers: int | None = None, vision_layers: int | None = None) -> Any:
    """
    Build the transformers config of a named shape.

    Parameters
    ----------
    name
        A key of `SHAPES`.
    layers
        Decoder layers; the checkpoint's own number by default.
    vision_layers
        Layers of the vision tower; the checkpoint's own number by default. Indices of special layers (full attention,
        deepstack) move in proportion.

    Returns
    -------
    transformers.PretrainedConfig

    Raises
    ------
    LmmhooksError
        An unknown name, or a number of layers that is not positive.
    """
    chosen = shape(name)
    text, vision = dict(chosen.text), dict(chosen.vision)
    for option, value in (("layers", layers), ("vision_layers", vision_layers)):
        if value is not None and value < 1:
            raise LmmhooksError(f"{option} is {value}: give 1 or more")
    if layers is not None:
        text["num_hidden_layers"] = layers
    config = AutoConfig.for_model(chosen.model_type, text_config=text, vision_config=vision, **chosen.extra)
    if vision_layers is not None:
        _scale_tower(config.vision_config, vision_layers)
    return config


def _scale_tower(config: Any, layers: int) -> None:
    before = config.num_hidden_layers
    setattr(config, "depth" if hasattr(config, "depth") else "num_hidden_layers", layers)
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if hasattr(config, name):
            moved = {max((index + 1) * layers // before - 1, 0) for index in getattr(config, name)}
            setattr(config, name, sorted(moved))


def build_model(
    name: str,
    layers: int | None = None,
    vision_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """
    Build a model of a named shape with random weights.

    Parameters
    ----------
    name
        A key of `SHAPES`.
    layers, vision_layers
        See :func:`build_config`.
    dtype
        Type of the weights.
    device
        Where the weights are made.
    attn_implementation
        Attention backend; transformers' own choice by default.
    seed
        Seed of the weights; the global generator is left as it was.

    Returns
    -------
    torch.nn.Module
        The unmodified transformers class, in evaluation mode.
    """
    config = build_config(name, layers, vision_layers)
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **options)
    # Random weights never stop by themselves, and a generation config with sampling in it would time other code.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    return model.eval()
