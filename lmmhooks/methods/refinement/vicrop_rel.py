"""
ViCrop by relative attention: what the last position of the prompt looks at, over what it looks at whatever is asked.

Attention over the image in one layer, mean over heads, is divided by that under "write a general description"; the best
window on the map is cut out of the image and shown beside it. Only one row of one layer is read, in two passes that
share everything up to where the prompts part, and the neutral one is made once per image.

As released, with these exceptions: cells lie where the model sees them, and attention that underflows under the neutral
prompt counts as no importance, where the released code divides 0 by 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import NEUTRAL, SHORT_ANSWER, Look, neutral_prompt
from lmmhooks.methods.refinement.vicrop import LayerViCrop

__all__ = ["ViCropRelative", "relative"]


def relative(question: Tensor, neutral: Tensor) -> Tensor:
    """Attention ``[H, n]`` of a question over that of a neutral prompt, head means: ``[n]`` float64."""
    return question.double().mean(dim=0) / neutral.double().mean(dim=0)


@dataclass(frozen=True)
class ViCropRelative(LayerViCrop):
    """Cut out what a question attends to beyond what the image attracts anyway."""

    id: ClassVar[str] = "vicrop-rel"

    neutral: str = setting(NEUTRAL, help="The neutral prompt.")
    suffix: str = setting(SHORT_ANSWER, help="Put behind it where the question ends with it; '' never.")

    def layers(self, family: Any) -> tuple[int, ...]:
        return (self._layer(family),)

    def importance(self, look: Look) -> Tensor:
        question = look.watch(look.prompt, max_new_tokens=1).rows[0, 0]
        prompt = neutral_prompt(look.prompt, self.neutral, self.suffix)
        key = look.digest(look.image), prompt
        if key not in look.memory:
            look.memory[key] = look.watch(prompt, max_new_tokens=1).rows[0, 0]
        return relative(question, look.memory[key])
