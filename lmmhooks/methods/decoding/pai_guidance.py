"""
PAI guidance: push the prediction away from what the model would say to the same prompt without its image.

``gamma L + (1 - gamma) L_text`` on plausible tokens, the classifier-free guidance that PAI adds to its attention boost,
as a method of its own: beside another attention method, or as the control that tells its effect from the boost's.

Differs from the released code: its log-probabilities are raw logits here, which is the same up to a constant per row;
the text-only reading follows its beam (the release leaves its cache where it was); any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import StepView

__all__ = ["PaiGuidance"]


@dataclass(frozen=True)
class PaiGuidance(DecodingMethod):
    """Guidance by the prompt without its image (see the module docstring)."""

    id: ClassVar[str] = "pai-guidance"
    paper: ClassVar[str] = "Paying More Attention to Image, ECCV 2024, arXiv 2407.21771 (logit refinement alone)"
    code: ClassVar[str] = "https://github.com/LALBJ/PAI"

    gamma: float = setting(
        1.1,
        help="Guidance, 0 or more; 1: none, and no plausibility cut either. Paper: 1.1 for all models; the command "
        "line of the release defaults to 2. Below 1 leans towards the reading without image.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.gamma >= 0, "gamma", "0 or more")

    @property
    def is_identity(self) -> bool:
        # As released: without guidance the log-probabilities go back as they came, uncut.
        return self.gamma == 1

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("text", image="none")]

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [self.gamma, 1 - self.gamma]
