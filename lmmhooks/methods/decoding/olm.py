"""
OLM (output-layer modification): answer "Yes" whenever the model hesitates between Yes and No.

A spurious baseline: where ``p(Yes) + p(No) > threshold`` and ``|p(Yes) - p(No)| < margin`` the answer is Yes, and what
the model says otherwise. It knows nothing about the image, and matches contrastive methods on yes/no benchmarks whose
base model says Yes too rarely. Applied at every step; all but the first token of an answer seldom meet the condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.controls import AnswerControl, word_ids
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Olm", "hesitates"]


def hesitates(main: Tensor, yes: Sequence[int], no: Sequence[int], threshold: float, margin: float) -> Tensor:
    """
    Rows ``[B]`` (bool) that are about to answer yes or no and are not sure which.

    Parameters
    ----------
    main
        Raw logits ``[B, vocabulary]``.
    yes, no
        Tokens that stand for either; probabilities add up.
    threshold, margin
        In [0, 1] and [0, 1].
    """
    probabilities = main.softmax(dim=-1)
    p_yes, p_no = (probabilities[:, list(ids)].sum(dim=-1) for ids in (yes, no))
    return (p_yes + p_no > threshold) & ((p_yes - p_no).abs() < margin)


@dataclass(frozen=True)
class Olm(AnswerControl):
    """Yes in case of doubt."""

    id: ClassVar[str] = "olm"
    paper: ClassVar[str] = "The Mirage of Performance Gains, arXiv 2504.10020 (spurious baseline)"
    code: ClassVar[str] = "https://github.com/ustc-hyin/cd_rethink"

    no: str | int = setting("No", help="The negative answer, as `yes`.")
    threshold: float = setting(0.2, help="Smallest p(Yes) + p(No), in [0, 1], at which the model is answering (paper).")
    margin: float = setting(0.5, help="Differences of p(Yes) and p(No) below it count as doubt, in [0, 1]; 0: none do.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_word("no")
        self._require(self.no != self.yes, "no", f"another answer than yes={self.yes!r}")
        self._require(0 <= self.threshold <= 1, "threshold", "in [0, 1]")
        self._require(0 <= self.margin <= 1, "margin", "in [0, 1]")

    @property
    def is_identity(self) -> bool:
        return self.margin == 0

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        yes, no = word_ids(self, self.yes, view), word_ids(self, self.no, view)
        doubt = hesitates(main, yes, no, self.threshold, self.margin)
        # Of several spellings of Yes, the one the model prefers.
        chosen = main.new_tensor(yes, dtype=torch.long)[main[:, yes].argmax(dim=-1)]
        others_fall = torch.arange(main.shape[-1], device=main.device) != chosen[:, None]
        return main.masked_fill(doubt[:, None] & others_fall, -math.inf)
