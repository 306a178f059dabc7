"""Which models can be used at all: asked before any of their parts is looked for."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

from torch import nn

__all__ = ["unusable", "uses_attention_interface"]


def uses_attention_interface(attention: nn.Module) -> bool:
    """Whether an attention module looks its kernel up in transformers' ``ALL_ATTENTION_FUNCTIONS``."""
    # Decorators hide the body: unwrap them, then read which globals the code refers to.
    code = getattr(unwrap(type(attention).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def unusable(model: Any) -> str | None:
    """Why a model can be refused without looking for its parts, or None."""
    if model.is_remote_code():
        return "it runs code from its repository (trust_remote_code); use a checkpoint of transformers' own class"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model, whose decoder has no visual tokens"
    if hasattr(model.config, "qformer_config"):
        return "its Q-Former answers with learned queries, which have no place in the image"
    crossing = next((m for m in model.modules() if "CrossAttention" in type(m).__name__), None)
    if crossing is not None:
        return f"its decoder reads the image through {type(crossing).__name__} and has no visual tokens"
    if not hasattr(model.base_model, "get_image_features") or not hasattr(model.config, "vision_config"):
        return "it takes no images"
    if not model._supports_attention_backend:
        return "its attention does not go through transformers' AttentionInterface"
    if model.get_output_embeddings() is None:
        return "it has no language head; load the ...ForConditionalGeneration class"
    return None
