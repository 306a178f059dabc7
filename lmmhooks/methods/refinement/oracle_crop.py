"""Control of methods that crop, from above: the part of the image that is known to hold the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmmhooks.errors import PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.controls import Box, CropControl

__all__ = ["OracleCrop"]


@dataclass(frozen=True)
class OracleCrop(CropControl):
    """Show the region that the caller points at beside the image: what the best possible map would gain."""

    id: ClassVar[str] = "oracle-crop"

    margin: float = setting(0.0, help="Added on every side, as a share of the region's longer side, 0 or more.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.margin >= 0, "margin", "0 or more")

    def box(self, look: Look) -> Box:
        if look.region is None:
            raise PromptError(
                "oracle-crop shows the part of the image that holds the answer, and was not told which; "
                "call answer(image, prompt, region=(left, top, right, bottom)) in pixels of the image"
            )
        left, top, right, bottom = look.region
        more = self.margin * max(right - left, bottom - top)
        return (
            max(left - more, 0.0),
            max(top - more, 0.0),
            min(right + more, float(look.image.width)),
            min(bottom + more, float(look.image.height)),
        )
