"""
Sign-flip control: another method that pushes towards its branches where it pushed away from them, and the reverse.

The weights of all branches change sign, ``w_i -> -w_i``, and the main branch takes what keeps their sum ``s``:
``w_0 -> 2 s - w_0``. Neither the scale of the logits nor the plausibility cut changes, only the direction: VCD's
``(1 + a; -a)`` becomes ``(1 - a; a)``, RITUAL's ``(1; a)`` becomes ``(1 + 2 a; -a)``. If that does as well, the
direction of the contrast is not what helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.methods.decoding.controls import ControlOf
from lmmhooks.methods.decoding.view import StepView

__all__ = ["SignFlip", "flipped"]


def flipped(weights: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Weights of the same sum, those after the first with the opposite sign."""
    main, *others = weights
    total = sum(others, start=main)
    return [2 * total - main, *(-weight for weight in others)]


@dataclass(frozen=True)
class SignFlip(ControlOf):
    """A method with the direction of its contrast reversed."""

    id: ClassVar[str] = "sign-flip"

    def check(self, family: Any) -> None:
        super().check(family)
        if type(self.method).combine is not DecodingMethod.combine:
            raise MethodError(
                f"{self.id}: of={self.of!r} is no weighted sum of branches and has no signs to flip; name one that is"
            )

    def parts(self) -> tuple[Method, ...]:
        """The method itself, everything about it but its weights."""
        kind = type(self.method)

        def weights(
            method: DecodingMethod, main: Tensor, others: Sequence[Tensor], step: int, view: StepView
        ) -> Sequence[float | Tensor]:
            return flipped(kind.weights(method, main, others, step, view))

        settings = {item.name: getattr(self.method, item.name) for item in fields(self.method) if item.init}
        return (type(f"Flipped{kind.__name__}", (kind,), {"weights": weights})(**settings),)
