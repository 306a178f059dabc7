"""Control of every method that shows a second picture: the second picture is the first one again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.controls import RefinementControl

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SameImageTwice"]


@dataclass(frozen=True)
class SameImageTwice(RefinementControl):
    """Show the image twice: the tokens of a second picture, and nothing new in it."""

    id: ClassVar[str] = "same-image-twice"

    def pictures(self, look: Look) -> list[Image]:
        return [look.image, look.image]
