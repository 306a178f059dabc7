"""
The plausibility cut alone: what most contrastive methods do to sampling before they contrast anything.

A control: ``L`` where ``L >= max L + log(beta)``, nothing elsewhere. Under greedy decoding and beams of one it is the
unpatched model; under sampling it explains much of what contrastive methods gain ("The Mirage of Performance Gains",
arXiv 2504.10020, which uses 0.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import DecodingMethod

__all__ = ["ApcOnly"]


@dataclass(frozen=True)
class ApcOnly(DecodingMethod):
    """Adaptive plausibility constraint without any contrast."""

    id: ClassVar[str] = "apc-only"
    paper: ClassVar[str] = "none; control of arXiv 2504.10020"
    code: ClassVar[str] = "https://github.com/ustc-hyin/cd_rethink"

    beta: float = setting(
        0.2, help="Tokens below this share of the largest probability are dropped, in [0, 1]; 0: none, 1: greedy."
    )
    lazy: bool = field(default=False, init=False)

    @property
    def is_identity(self) -> bool:
        return self.beta == 0
