"""
Prompts without a processor: tensors of a wanted size, made straight from a model's configuration.

The number of visual tokens is never guessed: the model encodes the made-up image once and the rows are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmmhooks.errors import LmmhooksError

__all__ = ["Prompt", "make_prompt"]


@dataclass(frozen=True)
class Prompt:
    """
    Inputs of a batch of equally long prompts, one image each.

    Attributes
    ----------
    inputs
        Keyword arguments of the model's `forward` and `generate`.
    batch
        Prompts.
    text
        Text tokens of each prompt, those before the image included.
    visual
        Visual tokens of each prompt.
    """

    inputs: dict[str, Tensor]
    batch: int
    text: int
    visual: int

    @property
    def tokens(self) -> int:
        """Length of each prompt."""
        return self.text + self.visual

    def image_inputs(self) -> dict[str, Tensor]:
        """Those inputs that describe the images."""
        return {name: value for name, value in self.inputs.items() if name.startswith(("pixel_", "image_"))}


def make_prompt(
    model: PreTrainedModel, batch: int = 1, text: int = 64, visual: int | None = None, prefix: int = 35, seed: int = 0
) -> Prompt:
    """
    Make a batch of prompts: some text, one image, more text; random token ids, random pixels.

    Parameters
    ----------
    model
        A multimodal transformers model.
    batch
        Prompts.
    text
        Text tokens of each prompt.
    visual
        Visual tokens of each image. Models with a free resolution make any number that a grid of at least 2 x 2 gives;
        the others have a few fixed numbers (LLaVA-1.5: 576). None takes the model's usual number.
    prefix
        Text tokens before the image; 35 is the system prompt of LLaVA-1.5. At most ``text - 1``.
    seed
        Seed of ids and pixels.

    Returns
    -------
    Prompt

    Raises
    ------
    LmmhooksError
        A model type that is not known here, or a number of visual tokens it cannot make.
    """
    config: Any = model.config
    if batch < 1 or text < 2:
        raise LmmhooksError(
            f"a batch of {batch} prompts with {text} text tokens: give at least 1 prompt and 2 text tokens"
        )
    builder = _BUILDERS.get(config.model_type)
    if builder is None:
        raise LmmhooksError(
            f"no prompt builder for model type {config.model_type!r}; known: {', '.join(sorted(_BUILDERS))}"
        )
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    images = builder(config, batch, visual, generator)
    images = {name: value.to(weight.device) for name, value in images.items()}
    images = {name: value.to(weight.dtype) if value.is_floating_point() else value for name, value in images.items()}
    found = _visual_tokens(model, images, batch)
    if visual is not None and found != visual:
        raise LmmhooksError(
            f"{config.model_type} makes {found} visual tokens of this image, not {visual}: ask for {found}"
        )

    before = min(prefix, text - 1)
    plain = _plain_ids(config)
    ids = plain[torch.randint(0, len(plain), (batch, text + found), generator=generator)]
    ids[:, before : before + found] = config.image_token_id
    inputs = {"input_ids": ids.to(weight.device), "attention_mask": torch.ones_like(ids).to(weight.device), **images}
    if hasattr(getattr(model, "model", model), "get_rope_index"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    return Prompt(inputs, batch, text, found)


def _plain_ids(config: Any) -> Tensor:
    """Ids that stand for text: those that the configuration gives no other meaning."""
    special = {value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))}
    ids = torch.arange(config.get_text_config().vocab_size)
    return ids[~torch.isin(ids, torch.tensor([value for value in special if isinstance(value, int)]))]


def _visual_tokens(model: PreTrainedModel, images: dict[str, Tensor], batch: int) -> int:
    with torch.no_grad():
        features = model.get_image_features(**images).pooler_output
    parts = [features] if isinstance(features, Tensor) else features
    width: int = model.config.get_text_config().hidden_size
    return sum(part.numel() for part in parts) // width // batch


def _fixed(config: Any, batch: int, visual: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """One crop of the tower's own size."""
    size = config.vision_config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=generator)}


def _anyres(config: Any, batch: int, visual: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """A square image that fills a 2 x 2 grid of crops exactly, beside its overview."""
    size = config.vision_config.image_size
    return {
        "pixel_values": torch.randn(batch, 5, 3, size, size, generator=generator),
        "image_sizes": torch.tensor([[2 * size, 2 * size]] * batch),
    }


def _patches(config: Any, batch: int, visual: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """Packed patches of a grid as close to a square as the number of visual tokens allows."""
    vision = config.vision_config
    visual = 1296 if visual is None else visual
    rows = next((rows for rows in range(math.isqrt(max(visual, 0)), 1, -1) if visual % rows == 0), 0)
    if not rows:
        raise LmmhooksError(
            f"{visual} visual tokens are no grid of at least 2 x 2: give a product such as 1296 = 36 x 36"
        )
    merge = vision.spatial_merge_size
    height, width = rows * merge, visual // rows * merge
    patch, frames = (
        max(s) if isinstance(s, (list, tuple)) else s for s in (vision.patch_size, vision.temporal_patch_size)
    )
    return {
        "pixel_values": torch.randn(
            batch * height * width, vision.in_channels * frames * patch * patch, generator=generator
        ),
        "image_grid_thw": torch.tensor([[1, height, width]] * batch),
    }


_BUILDERS: dict[str, Callable[[Any, int, int | None, torch.Generator], dict[str, Tensor]]] = {
    "internvl": _fixed,
    "llava": _fixed,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "qwen2_5_vl": _patches,
    "qwen2_vl": _patches,
    "qwen3_vl": _patches,
}
