"""
Raw attention: the share of a row that falls on every visual token, mean over layers and heads.

The definition of most papers that read attention; each row is the one that chooses a token of the answer, its softmax
goes over all keys. ``normalise="within"`` restricts the row of every head to the image before the mean is taken, which
is what a softmax over the logits of visual keys alone gives (API prompting, 2409.17143).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question

__all__ = ["Raw"]


@dataclass(frozen=True)
class Raw(MapKind):
    """Attention as it is."""

    id: ClassVar[str] = "raw"

    def values(self, question: Question) -> Tensor:
        return question.mean_rows()
