"""The crops of a prompt's images as the model saw them, for drawing on: where a token lies there needs no guess."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lmmhooks.errors import ModelError
from lmmhooks.family import Family
from lmmhooks.inspect.reading import Reading
from lmmhooks.inspect.report import Picture
from lmmhooks.vision import VisionInputs

__all__ = ["pictures_of"]


def pictures_of(family: Family, reading: Reading, processor: Any) -> tuple[Picture, ...]:
    """
    Crops of all images whose token grid and pixels are known, by sample, image and crop; videos are left out.

    Parameters
    ----------
    family
        Of the model.
    reading
        Of the prompts.
    processor
        Its image processor tells how pixels were normalised; without one they are stretched to the full range.
    """
    calls = {call.modality: call for call in reading.vision}
    pictures: list[Picture] = []
    for span in reading.layout.spans:
        call = calls.get(span.modality)
        if span.modality != "image" or call is None or not span.tokens.grids:
            continue
        crops = _crops(family, call, span.source)
        if crops is None or len(crops) != len(span.tokens.grids):
            continue
        for crop, (grid, pixels) in enumerate(zip(span.tokens.grids, crops, strict=True)):
            pictures.append(Picture(span.sample, span.image, crop, grid, _visible(pixels, processor)))
    return tuple(pictures)


def _crops(family: Family, call: VisionInputs, source: int) -> Tensor | None:
    """Pixels ``[crops, C, H, W]`` of an image; None where they are not to be had."""
    if call.pixels_name not in call.kwargs:
        return None
    try:
        images = family.unpack_pixels(call)
    except ModelError:
        return None
    per_image = family.crops_of(call)
    if len(images) == len(per_image):
        return images[source]
    # The encoder was given single tiles.
    start = sum(per_image[:source])
    return torch.cat(images[start : start + per_image[source]])


def _visible(pixels: Tensor, processor: Any) -> Image.Image:
    x = pixels.detach().float().cpu()
    known = getattr(processor, "image_processor", None)
    mean, std = getattr(known, "image_mean", None), getattr(known, "image_std", None)
    if mean is not None and std is not None:
        x = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        x = (x - x.amin()) / (x.amax() - x.amin()).clamp_min(1e-12)
    return Image.fromarray((x.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy())
