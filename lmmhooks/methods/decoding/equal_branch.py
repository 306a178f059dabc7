"""
Equal-branch control: another method with every branch reading the prompt, image included, exactly as the main one.

Costs what the method costs and can know nothing that the main branch does not: what remains of its effect is that of
the plausibility cut and of the sum of its weights. In exact arithmetic the same as `temperature`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lmmhooks.methods.decoding.base import Branch
from lmmhooks.methods.decoding.controls import ControlOf

__all__ = ["EqualBranch"]


@dataclass(frozen=True)
class EqualBranch(ControlOf):
    """Branches that all show the original."""

    id: ClassVar[str] = "equal-branch"

    def branches(self, family: Any) -> list[Branch]:
        return self.shown(family, "same")
