"""Control of methods that crop: anywhere in the image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.controls import Box, CropControl, window

__all__ = ["RandomCrop"]


@dataclass(frozen=True)
class RandomCrop(CropControl):
    """Show a part of the image at a place drawn uniformly; the same for one image and seed, whatever is asked."""

    id: ClassVar[str] = "random-crop"

    share: float = setting(0.25, help="Share of the image's area that is cut out, of its own aspect, in (0, 1].")
    seed: int = setting(0, help="Of the places; each image draws its own.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.share <= 1, "share", "in (0, 1]")

    def box(self, look: Look) -> Box:
        name = hashlib.blake2b(f"{self.seed}/".encode() + look.digest(look.image), digest_size=8)
        across, down = np.random.default_rng(int.from_bytes(name.digest(), "little")).random(2)
        return window(look.image.size, self.share, float(across), float(down))
