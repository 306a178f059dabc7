"""
Decoding identity: every hook of the decoding engine in place, and logits that are the model's own.

A control: the output must be bit-identical to the model without lmmhooks. ``stacked=True`` reads the prompt in a second
branch as well and drops it, which shows what stacking rows alone does to floating-point results (in exact arithmetic
nothing); ``beta`` above 0 is the control "plausibility cut alone".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import StepView

__all__ = ["DecodingIdentity"]


@dataclass(frozen=True)
class DecodingIdentity(DecodingMethod):
    """Passes the logits of the main branch through the decoding engine."""

    id: ClassVar[str] = "decoding-identity"
    paper: ClassVar[str] = "none; control"

    beta: float = setting(0.0, help="Plausibility cut in [0, 1]; 0, the default, leaves the logits as they are.")
    stacked: bool = setting(False, help="Run a copy of the main branch in every forward and drop its logits.")

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("copy")] if self.stacked else []

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        return super().combine(main, [], step, view)
