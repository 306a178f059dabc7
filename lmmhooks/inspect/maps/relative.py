"""
Relative attention: a question's attention divided by that of a neutral instruction.

What the picture attracts whatever is asked drops out. "MLLMs Know Where to Look" (ViCrop, ICLR 2025, 2502.17422), code
saccharomycetes/mllms_know: one layer, the last prompt position, no epsilon. Here the answer's later tokens are divided
by the neutral prompt's last position too, and with several layers their mean is (the paper finds the mean over all
layers to work as well). CARVE's contrast, which pairs steps and fuses layers, is the method of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question
from lmmhooks.methods.refinement.base import NEUTRAL

__all__ = ["Relative", "relative"]


def relative(question: Tensor, neutral: Tensor, epsilon: float = 0.0) -> Tensor:
    """
    Ratio of two maps.

    Parameters
    ----------
    question
        ``[..., n]`` attention, at least 0.
    neutral
        ``[n]`` attention of the neutral prompt.
    epsilon
        Added to it; 0 in ViCrop's code.

    Returns
    -------
    Tensor
        ``[..., n]``. Neutral attention counts as at least the smallest normal float32, so that 0 / 0 is 0, where the
        released code gives NaN.
    """
    floor = torch.finfo(torch.float32).tiny
    return question.float() / (neutral.float() + epsilon).clamp(min=floor)


@dataclass(frozen=True)
class Relative(MapKind):
    """
    Attention over that of a neutral prompt; one more reading of the prompt.

    Attributes
    ----------
    neutral_prompt
        The neutral question; papers append to it whatever ends their questions.
    epsilon
        See `relative`; at least 0.
    """

    neutral_prompt: str = NEUTRAL
    epsilon: float = 0.0

    id: ClassVar[str] = "relative"
    paper: ClassVar[str] = "ViCrop, ICLR 2025 (2502.17422)"

    def __post_init__(self) -> None:
        self._require(bool(self.neutral_prompt.strip()), "neutral_prompt", "a text")
        self._require(self.epsilon >= 0, "epsilon", "0 or more")

    def values(self, question: Question) -> Tensor:
        neutral = question.passes.answer(question.image, 1, question.heads, prompt=self.neutral_prompt)
        return relative(question.mean_rows(), question.mean_rows(neutral, [0])[0], self.epsilon)
