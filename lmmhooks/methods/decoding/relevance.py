"""Which pixels matter: heat maps from coarse relevance, and an image-text matching model that gives it for a text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.context import CLIP_MEAN, CLIP_STD

__all__ = ["BlipMatcher", "caption", "check_matcher_folder", "heat_map", "hottest", "num_hottest"]

#: Standard deviation of the blur, as a share of the side of the map (released code).
BLUR = 0.02
MAX_WORDS = 50


def heat_map(relevance: Tensor, size: tuple[int, int]) -> Tensor:
    """
    Coarse relevance as a smooth map in [0, 1].

    Normalised to [0, 1], enlarged by cubic splines, clipped, blurred and normalised again, in double precision.

    Parameters
    ----------
    relevance
        ``[rows, columns]``, any device.
    size
        Height and width of the map.

    Returns
    -------
    Tensor
        float64 ``size`` on the CPU; zero everywhere if all of it is equally relevant.
    """
    from scipy import ndimage

    grid = _normalised(relevance.double().cpu())
    factors = [long / short for long, short in zip(size, grid.shape, strict=True)]
    large = ndimage.zoom(grid.numpy(), factors, order=3, mode="grid-constant", cval=0, grid_mode=True).clip(0, 1)
    blurred = ndimage.gaussian_filter(large, [BLUR * side for side in size])
    return _normalised(torch.from_numpy(blurred))


def num_hottest(num_pixels: int, similarity: float) -> int:
    """Rank of the coolest pixel that stays: the better the text matches the image, the fewer do."""
    return int(num_pixels * min(1 - similarity / 2, 1 - 1e-5))


def hottest(heat: Tensor, rank: int) -> Tensor:
    """Bool like ``heat``: at least as hot as the pixel of that rank, 0 being the hottest; ties stay together."""
    return heat >= heat.flatten().sort(descending=True).values[rank]


def caption(text: str) -> str:
    """A text as BLIP was trained on captions: lower case, no punctuation, at most 50 words."""
    words = re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()
    return " ".join(words[:MAX_WORDS])


def _normalised(values: Tensor) -> Tensor:
    low, high = values.amin(), values.amax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def check_matcher_folder(method_id: str, folder: str, layer: int) -> None:
    """Refuse a folder without a BLIP checkpoint that has such a text layer; MethodError with what was found."""
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise MethodError(
            f"{method_id}: matcher={folder!r} is no checkpoint folder (no config.json); give a local folder of a BLIP "
            "matching model, such as Salesforce/blip-itm-large-coco"
        )
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "blip":
        raise MethodError(f"{method_id}: matcher={folder!r} holds a model of type {config.model_type!r}, not BLIP")
    if layer >= (depth := config.text_config.num_hidden_layers):
        raise MethodError(f"{method_id}: layer={layer} is not in the matcher, whose text layers are 0 to {depth - 1}")


class BlipMatcher:
    """
    BLIP's matching model, in float32.

    Parameters
    ----------
    folder
        Local checkpoint with tokenizer.
    device
        Where it runs.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        # Weights made in inference mode could not be differentiated through.
        with torch.inference_mode(False):
            model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
            self.model: Any = model.eval().requires_grad_(False).to(device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.side: int = self.model.config.vision_config.image_size
        self.grid: int = self.side // self.model.config.vision_config.patch_size

    def match(self, rgb: Tensor, text: str, layer: int) -> tuple[Tensor, float]:
        """
        What of an image matters to a text.

        Parameters
        ----------
        rgb
            ``[3, H, W]`` in [0, 1].
        text
            What is asked.
        layer
            Layer of the text encoder, 0-based, whose attention to patches is weighted by its gradient.

        Returns
        -------
        relevance
            float32 ``[rows, columns]`` of the matcher's patches.
        similarity
            Cosine of image and text.
        """
        with torch.inference_mode(False), torch.enable_grad():
            ids = torch.tensor([self.tokenizer(caption(text), truncation=True, max_length=512)["input_ids"]])
            ids = ids.to(self.model.device)
            with torch.no_grad():
                seen = self.model.vision_model(pixel_values=self._pixels(rgb.clone())).last_hidden_state
                embedded = [
                    torch.nn.functional.normalize(states[:, 0], dim=-1)
                    for states in (
                        self.model.vision_proj(seen),
                        self.model.text_proj(self.model.text_encoder(input_ids=ids).last_hidden_state),
                    )
                ]
            return self._relevance(ids, seen, layer), float((embedded[0] * embedded[1]).sum())

    def _pixels(self, rgb: Tensor) -> Tensor:
        size = (self.side, self.side)
        scaled = torch.nn.functional.interpolate(rgb[None].float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=rgb.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        return ((scaled - mean) / std).to(self.model.device)

    def _relevance(self, ids: Tensor, seen: Tensor, layer: int) -> Tensor:
        config = self.model.config.text_config
        ids = ids.clone()
        # The matching head was trained behind its own first token, the one after that of the decoder.
        ids[:, 0] = min(config.bos_token_id + 1, config.vocab_size - 1)
        held: list[Tensor] = []

        def hold(module: Any, args: Any, output: Tensor) -> Tensor:
            # Nothing in front of this layer needs a gradient.
            held.append(output.detach().requires_grad_())
            return held[0]

        dropout = self.model.text_encoder.encoder.layer[layer].crossattention.self.dropout
        hook = dropout.register_forward_hook(hold)
        try:
            out = self.model.text_encoder(
                input_ids=ids,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            )
        finally:
            hook.remove()
        loss = self.model.itm_head(out.last_hidden_state[:, 0])[:, 1].sum()
        (gradient,) = torch.autograd.grad(loss, held[0])
        # Without the class token of the image, and the special tokens around the text.
        cam = (held[0] * gradient.clamp(min=0)).detach()[0, :, 1:-1, 1:]
        return cam.mean(dim=(0, 1)).view(self.grid, self.grid)
