"""Control of methods that crop: the middle of the image, where photographers put what matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.controls import Box, CropControl, window

__all__ = ["CentreCrop"]


@dataclass(frozen=True)
class CentreCrop(CropControl):
    """Show the middle of the image beside it; give it the mean share of the crops it is compared with."""

    id: ClassVar[str] = "centre-crop"

    share: float = setting(0.25, help="Share of the image's area that is cut out, of its own aspect, in (0, 1].")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.share <= 1, "share", "in (0, 1]")

    def box(self, look: Look) -> Box:
        return window(look.image.size, self.share)
