"""
Reduction identity: every hook of the reduction engine in place, nothing removed.

A control: the output must be bit-identical to the model without lmmhooks, which shows that a measured difference comes
from a method and not from the machinery.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lmmhooks.methods.reduction.base import Cut, ReductionMethod

__all__ = ["ReductionIdentity"]


@dataclass(frozen=True)
class ReductionIdentity(ReductionMethod):
    """Cuts before every decoder layer and keeps everything."""

    id: ClassVar[str] = "reduction-identity"
    paper: ClassVar[str] = "none; control"

    # Settings of other reducers that would change nothing here.
    keep: int | float | None = field(default=1.0, init=False, repr=False)
    positions: Any = field(default="keep", init=False, repr=False)
    newline: Any = field(default="drop", init=False, repr=False)

    @property
    def is_identity(self) -> bool:
        # The point of this method is to attach everything.
        return False

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(layer, 1.0) for layer in range(family.num_layers)]
