"""Loading the model a recipe names, with the settings it fixes."""

from __future__ import annotations

from typing import Any

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.recipe import Recipe

__all__ = ["load_model"]


def load_model(recipe: Recipe) -> tuple[Any, Any]:
    """
    Model and processor of a recipe, through `lmmhooks.load`.

    Raises
    ------
    RecipeError
        If quantised weights are asked for and bitsandbytes is not installed.
    LmmhooksError
        If the model cannot be found or is not supported.
    """
    import lmmhooks

    settings: dict[str, Any] = {"dtype": recipe.dtype}
    for name in ("revision", "attn_implementation", "device_map"):
        if getattr(recipe, name) is not None:
            settings[name] = getattr(recipe, name)
    if recipe.quantization is not None:
        settings["quantization_config"] = _quantization(recipe.quantization)
    model, processor = lmmhooks.load(recipe.model, **settings)
    model.eval()
    return model, processor


def _quantization(name: str) -> Any:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise RecipeError(f"quantization: {name} needs bitsandbytes; pip install 'lmmhooks[quant]', or leave it unset")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=name == "bnb-4bit", load_in_8bit=name == "bnb-8bit")
