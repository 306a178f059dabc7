"""
Yes offset: a number added to the logit of "Yes" at the first token of the answer, and nothing else.

A control: the best such number, tuned on a held-out split, is all that a method gains by shifting answers in one
direction. What a method gains beyond it is discrimination.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.controls import AnswerControl, word_ids
from lmmhooks.methods.decoding.view import StepView

__all__ = ["YesOffset"]


@dataclass(frozen=True)
class YesOffset(AnswerControl):
    """A bias towards (or, below 0, against) Yes."""

    id: ClassVar[str] = "yes-offset"
    paper: ClassVar[str] = "none; control"

    offset: float = setting(1.0, help="Added to the logit of Yes at the first token; any finite number, 0: nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(math.isfinite(self.offset), "offset", "a finite number")

    @property
    def is_identity(self) -> bool:
        return self.offset == 0

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        if step:
            return main
        shifted = main.clone()
        shifted[:, word_ids(self, self.yes, view)] += self.offset
        return shifted
