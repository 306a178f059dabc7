"""
M3ID: amplify what the image adds over a text-only prediction, the more the longer the answer already is.

``(1 + c_t) L - c_t L_text`` with ``c_t = exp(lam t) - 1``, because reliance on the image fades as text grows.

There is no official code; two re-implementations by another group agree on everything but the first ``t``, which is 0
in RITUAL's (no correction of the first token, preset "ritual") and 1 in AvisC's, the default here. Both have the
plausibility cut in place of the paper's gate, whose threshold is not known; `gate` adds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import StepView

__all__ = ["M3id", "correction", "unsure"]


def correction(t: int, lam: float, max_c: float | None) -> float:
    """``(1 - g) / g`` with ``g = exp(-lam t)``, the share of the image that is left: 0 at ``t = 0``, without bound."""
    # Above e^700 there is no float64; any cap is long reached.
    c = math.expm1(min(lam * t, 700.0))
    return c if max_c is None else min(c, max_c)


def unsure(main: Tensor, gate: float) -> Tensor:
    """Rows ``[B, 1]`` (bool) in which the most likely token has a probability below ``gate``."""
    return main.log_softmax(dim=-1).amax(dim=-1, keepdim=True) < math.log(gate)


@dataclass(frozen=True)
class M3id(DecodingMethod):
    """Multi-modal mutual-information decoding (see the module docstring)."""

    id: ClassVar[str] = "m3id"
    paper: ClassVar[str] = (
        "Multi-Modal Hallucination Control by Visual Information Grounding, CVPR 2024, arXiv 2403.14003"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ritual": {"t0": 0},  # the re-implementation in RITUAL's code
    }

    lam: float = setting(
        0.02,
        help="Rate in 1 / tokens, 0 or more, at which the image is forgotten (re-implementations: 0.02); 0: never.",
    )
    t0: int = setting(1, help="t of the first generated token, 0 or more; with 0 that token is not corrected.")
    max_c: float | None = setting(
        None, help="Cap of the correction, above 0; None, as released: it grows without bound (27 at t = 167)."
    )
    gate: float | None = setting(
        None,
        help="Correct only where no token has at least this probability, in (0, 1]; None: everywhere. The paper has "
        "such a gate, its value is UNVERIFIED.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.lam >= 0, "lam", "0 or more")
        self._require(self.t0 >= 0, "t0", "0 or more")
        self._require(self.max_c is None or self.max_c > 0, "max_c", "above 0, or None")
        self._require(self.gate is None or 0 < self.gate <= 1, "gate", "in (0, 1], or None")

    @property
    def is_identity(self) -> bool:
        return self.lam == 0 and self.beta == 0

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("text", image="none")] if self.lam else []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float | Tensor]:
        c = correction(step + self.t0, self.lam, self.max_c)
        if self.gate is None:
            return [1 + c, -c]
        per_row = torch.where(unsure(main, self.gate), c, 0.0)
        return [1 + per_row, -per_row]
