"""
Temperature control: what another method makes of the logits when every branch agrees with the main one.

Weights that sum to ``s`` sharpen the distribution like a temperature of ``1 / s`` whatever the branches show, which
for methods that add views (RITUAL: s = 4, AGLA: s = 3) may be most of their gain under sampling. This is ``s L`` on the
plausible tokens of the method, without running any branch: for fixed weights the same as
``generate(temperature=1 / s)`` on top of `apc-only`; weights that follow the step or a gate are followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch
from lmmhooks.methods.decoding.controls import ControlOf
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Temperature"]


@dataclass(frozen=True)
class Temperature(ControlOf):
    """The scale of a method's weights without its branches."""

    id: ClassVar[str] = "temperature"

    of: str = setting("ritual", help="The method whose sum of weights and cut are kept, such as 'ritual(alpha=2.0)'.")

    def branches(self, family: Any) -> list[Branch]:
        return []

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        num = len(self.method.branches(view.family))
        return self.method.combine(main, [main] * num, step, view)
