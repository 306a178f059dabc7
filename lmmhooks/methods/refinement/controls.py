"""
What controls of methods that add a picture have in common: they look at nothing, and show another picture.

A gain that comes from more pixels, more tokens or a second image of whatever content is no gain of knowing where to
look. Each control keeps one of these and gives up the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.answering import Ask
from lmmhooks.methods.refinement.base import Look, RefinementMethod
from lmmhooks.methods.refinement.operators import cropped

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CropControl", "RefinementControl", "window"]

Box = tuple[float, float, float, float]


def window(size: tuple[int, int], share: float, across: float = 0.5, down: float = 0.5) -> tuple[int, int, int, int]:
    """
    A box of the image's own aspect.

    Parameters
    ----------
    size
        Width and height of the image.
    share
        Of its area that the box covers, in (0, 1].
    across, down
        Where the box lies between the sides that it could touch, 0 (left, top) to 1.

    Returns
    -------
    tuple of int
        Left, top, right, bottom in pixels; one pixel at least.
    """
    sides = [max(round(side * share**0.5), 1) for side in size]
    left, top = (round((whole - part) * at) for whole, part, at in zip(size, sides, (across, down), strict=True))
    return left, top, left + sides[0], top + sides[1]


@dataclass(frozen=True)
class RefinementControl(RefinementMethod):
    """Answers once, about pictures that nothing was looked at for."""

    paper: ClassVar[str] = "none; control"

    def pictures(self, look: Look) -> list[Image]:
        """What the answer is about, in order."""
        raise NotImplementedError

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """The answer about the pictures."""
        look: Look = ask  # type: ignore[assignment] # what the engine gives to methods of this kind
        return look.tell(prompt, self.pictures(look), **generate_kwargs).text


@dataclass(frozen=True)
class CropControl(RefinementControl):
    """Shows a part of the image that no map chose."""

    show: str = setting("both", help="Pictures of the answer: 'both', the image and its part, or 'refined', the part.")

    def __post_init__(self) -> None:
        self._require(self.show in ("both", "refined"), "show", "'both' or 'refined'")

    def box(self, look: Look) -> Box:
        """Left, top, right and bottom of the part, in pixels of the image."""
        raise NotImplementedError

    def pictures(self, look: Look) -> list[Image]:
        part = cropped(look.image, self.box(look))
        return [look.image, part] if self.show == "both" else [part]
