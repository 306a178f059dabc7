"""
Placebo control: another method whose branches show an unrelated image instead of what it makes of the given one.

If that does as well, what the method does to the image does not matter. Every branch reads the prompt as given with the
placebo in the image's place, in the size the model sees, in every crop alike: a picture drawn from `seed` (coloured
gradients under discs), another one for each image, or a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.controls import ControlOf

__all__ = ["PlaceboImage", "draw_picture"]

NUM_DISCS = 12


def draw_picture(height: int, width: int, generator: torch.Generator) -> Tensor:
    """
    A picture of nothing: a smooth field of colours under a dozen discs.

    Parameters
    ----------
    height, width
        In pixels.
    generator
        On the CPU.

    Returns
    -------
    Tensor
        ``[3, H, W]`` RGB in [0, 1] on the CPU.
    """
    field = torch.rand(1, 3, 4, 4, generator=generator)
    picture = functional.interpolate(field, size=(height, width), mode="bilinear", align_corners=False)[0]
    rows, cols = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    centres, colours = torch.rand(NUM_DISCS, 2, generator=generator), torch.rand(NUM_DISCS, 3, generator=generator)
    radii = 0.05 + 0.15 * torch.rand(NUM_DISCS, generator=generator)
    for (row, col), colour, radius in zip(centres, colours, radii, strict=True):
        inside = (rows - row) ** 2 + (cols - col) ** 2 < radius**2
        picture = torch.where(inside, colour[:, None, None], picture)
    return picture


def load_picture(path: str, height: int, width: int) -> Tensor:
    """A file as ``[3, H, W]`` RGB in [0, 1], stretched to a size."""
    from lmmhooks.prompting import open_image

    image = open_image(path).resize((width, height))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(height, width, 3).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class PlaceboImage(ControlOf):
    """Branches that all show an unrelated image."""

    id: ClassVar[str] = "placebo-image"

    image: str | None = setting(None, help="Path of the unrelated image; None: a picture drawn from the seed.")
    seed: int = setting(0, help="Seed of that picture, 0 or more; each image draws from this seed and its own pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.seed >= 0, "seed", "0 or more")
        if self.image is not None:
            load_picture(self.image, 1, 1)

    def branches(self, family: Any) -> list[Branch]:
        return self.shown(family, "pixels")

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        height, width = pixels.shape[-2:]
        picture = (
            draw_picture(height, width, generator) if self.image is None else load_picture(self.image, height, width)
        )
        return context.from_rgb(picture.to(pixels)).expand(pixels.shape)
