"""Loading the model a recipe names, with the settings it fixes."""

from __future__ import annotations

from typing import Any

from lmmhooks_eval.recipe import Recipe

__all__ = ["load_model"]


def load_model(recipe: Recipe) -> tuple[Any, Any]:
    """
    Model and processor of a recipe, through `lmmhooks.load`.

    Raises
    ------
    LmmhooksError
        If the model cannot be found or is not supported, or needs a package that is not installed.
    """
    import lmmhooks

    return lmmhooks.load(
        recipe.model,
        dtype=recipe.dtype,
        device_map=recipe.device_map,
        attn_implementation=recipe.attn_implementation,
        revision=recipe.revision,
        quantization=recipe.quantization,
    )
