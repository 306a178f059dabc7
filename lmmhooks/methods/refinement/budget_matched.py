"""Control of every method that adds tokens: the image alone, at the resolution that has as many of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil, floor, sqrt
from typing import Any, ClassVar

from PIL import Image as images

from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.answering import Ask
from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.controls import RefinementControl

__all__ = ["BudgetMatched", "grid_of"]


def grid_of(size: tuple[int, int], tokens: float) -> tuple[int, int]:
    """
    The grid of an image whose number of cells comes nearest to a number.

    Parameters
    ----------
    size
        Width and height of the image.
    tokens
        Cells that are wanted, 1 or more.

    Returns
    -------
    tuple of int
        Columns and rows, each rounded up or down from where the aspect of the image would be kept.
    """
    width, height = size
    scale = sqrt(tokens / (width * height))
    sides = [{max(floor(side * scale), 1), ceil(side * scale)} for side in size]
    # Of grids as near, the one whose aspect is nearer.
    return min(
        product(*(sorted(side) for side in sides)),
        key=lambda grid: (abs(grid[0] * grid[1] - tokens), abs(grid[0] / grid[1] - width / height)),
    )


@dataclass(frozen=True)
class BudgetMatched(RefinementControl):
    """Show the image alone, larger: a method that does not beat it has not earned its second picture."""

    id: ClassVar[str] = "budget-matched"

    ratio: float = setting(
        2.0, help="Visual tokens over those of the image as it is, above 0; 2: a second picture as large as the first."
    )
    tolerance: float = setting(0.1, help="Share by which the realised number may be off, 0 or more.")

    def __post_init__(self) -> None:
        self._require(self.ratio > 0, "ratio", "above 0")
        self._require(self.tolerance >= 0, "tolerance", "0 or more")

    def check(self, family: Any) -> None:
        if family.pixels_per_token is None:
            raise MethodError(
                f"budget-matched: how many visual tokens {family.name} gives an image does not follow the size of the "
                "image, so that no resolution has twice as many; compare with same-image-twice, which has"
            )

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """
        The answer about the enlarged image.

        Raises
        ------
        PromptError
            No grid of the image's aspect has a number of tokens near enough.
        """
        look: Look = ask  # type: ignore[assignment] # what the engine gives to methods of this kind
        wanted = self.ratio * look.geometry.num_tokens
        columns, rows = grid_of(look.image.size, wanted)
        if abs(columns * rows - wanted) > self.tolerance * wanted:
            raise PromptError(
                f"budget-matched: {look.image.width} x {look.image.height} pixels come nearest to {wanted:g} visual "
                f"tokens with {columns} x {rows}, off by more than {self.tolerance:g}; raise tolerance, or leave the "
                "image out of the comparison"
            )
        side = look.family.pixels_per_token
        picture = look.image.resize((columns * side, rows * side), images.Resampling.BICUBIC)
        pixels = picture.width * picture.height
        # The bounds of the processor are those of the model as it is; between these the size is taken as it is.
        bounds = {"size": {"shortest_edge": pixels, "longest_edge": pixels}}
        return look.tell(prompt, [picture], images_kwargs=bounds, **generate_kwargs).text
