"""
API (attention prompting on image): fade what the model does not look at, and ask again about the faded picture.

The map is the attention that a short answer pays to the image; what it leaves out fades to a flat grey, softly, and the
second answer is given about that picture alone. The auxiliary model of the paper is the model itself, so that the first
answer costs what the plain answer costs.

The background is 200 as in the released results, whose script reads an option for it and never uses it; cells lie where
the model sees them, where the released code stretches its map over images that were padded to a square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.operators import fade
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.refinement.softmask import AnswerMap

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Api", "weakened"]

#: The second of the prompts that the authors ship.
HINT = "{question} (Hint: The answer is related to the unmasked visible regions.)"


def weakened(mask: Image, strength: float) -> Image:
    """An 8-bit mask that hides only a share of what it hid: ``255 - strength (255 - m)``."""
    return mask if strength == 1 else mask.point(lambda level: 255 - strength * (255 - level))


@dataclass(frozen=True)
class Api(AnswerMap):
    """Fade what an answer does not attend to into grey."""

    id: ClassVar[str] = "api"
    paper: ClassVar[str] = "Attention Prompting on Image for Large Vision-Language Models, ECCV 2024, arXiv:2409.17143"
    code: ClassVar[str] = "https://github.com/yu-rp/apiprompting"
    presets: ClassVar[dict[str, dict[str, str]]] = {"hint": {"template": HINT}}

    background: float = setting(200.0, help="Grey level of what is faded out, 0 to 255 (released: 200).")
    strength: float = setting(1.0, help="Share of the fading that is applied, in [0, 1]; 0 leaves the image as it is.")
    template: str = setting("{question}", help="How the second answer is asked for, with {question}; preset 'hint'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.background <= 255, "background", "in [0, 255]")
        self._require(0 <= self.strength <= 1, "strength", "in [0, 1]")
        self._require("{question}" in self.template, "template", "a text with {question}")

    @property
    def is_identity(self) -> bool:
        return self.strength == 0 and self.show == "refined" and self.template == "{question}"

    def refined(self, image: Image, saliency: Saliency) -> Image:
        return fade(image, weakened(self.mask(saliency), self.strength), self.background)

    def question(self, prompt: str) -> str:
        return self.template.replace("{question}", prompt)
