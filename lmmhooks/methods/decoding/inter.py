"""
INTER: where candidates differ in how much they owe to image and question together, add what they owe to it.

What image and question say together beyond what either says alone is their Harsanyi dividend
``I = u_vq - u_v - u_q + u_0`` of log-probabilities, an absent player's tokens being left out of the prompt. Where its
variance over the candidate tokens exceeds `tau`, the step is a keyword step: ``L + alpha I`` on the candidates, nothing
else. Other steps are left alone.

There is no released code, and every concrete choice here is UNVERIFIED against the paper: players, baselines,
candidates, gate and strength. Nothing is claimed to reproduce its figures. Generated tokens are always present, and so
is what stands before the image and what opens the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod, contrast, cut, plausible
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.prompts import question_span
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Inter", "candidates", "interaction", "variance"]

PRIORS = ("dividend", "softmax")


def interaction(both: Tensor, image: Tensor, question: Tensor, neither: Tensor) -> Tensor:
    """
    Harsanyi dividend of image and question.

    Parameters
    ----------
    both, image, question, neither
        Log-probabilities ``[B, vocabulary]`` with these players present.

    Returns
    -------
    Tensor
        Of the same shape; its sign changes when the presence of either player is exchanged.
    """
    return both - image - question + neither


def candidates(main: Tensor, k: int, beta: float) -> Tensor:
    """The ``k`` largest logits of a row (0: all; ties: all of them) that also pass the plausibility cut, bool."""
    chosen = torch.ones_like(main, dtype=torch.bool)
    if 0 < k < main.shape[-1]:
        chosen = main >= main.topk(k, dim=-1).values[..., -1:]
    passes = plausible(main, beta)
    return chosen if passes is None else chosen & passes


def variance(values: Tensor, among: Tensor) -> Tensor:
    """Population variance ``[B, 1]`` of the values for which ``among`` holds; 0 for a single one."""
    count = among.sum(dim=-1, keepdim=True)
    mean = values.masked_fill(~among, 0).sum(dim=-1, keepdim=True) / count
    return (values - mean).square().masked_fill(~among, 0).sum(dim=-1, keepdim=True) / count


@dataclass(frozen=True)
class Inter(DecodingMethod):
    """Interaction guidance sampling (see the module docstring)."""

    id: ClassVar[str] = "inter"
    paper: ClassVar[str] = (
        "INTER: Interaction Guidance Sampling, ICCV 2025, arXiv 2507.05056 (no code; not a reproduction)"
    )

    alpha: float = setting(1.0, help="Weight of the interaction, 0 or more; 0: candidates alone. UNVERIFIED.")
    k: int = setting(10, help="Candidates: so many of the largest logits, 1 or more; 0: all. UNVERIFIED.")
    beta: float = setting(0.0, help="Candidates must also have this share of the largest probability; 0: no such cut.")
    tau: float = setting(0.0, help="Variance above which a step is gated, 0 or more; inf: no step. UNVERIFIED.")
    prior: str = setting(
        "dividend",
        help="What is added: 'dividend', I itself; 'softmax', its log-softmax over the candidates. UNVERIFIED.",
    )
    answer_prefix: int | None = setting(
        None,
        help="Tokens at the end of the prompt that open the answer, no part of the question; None: as the processor's "
        "chat template tells.",
    )
    lazy: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(self.k >= 0, "k", "0 or more")
        self._require(self.tau >= 0, "tau", "0 or more")
        self._require(self.prior in PRIORS, "prior", " or ".join(PRIORS))
        self._require(self.answer_prefix is None or self.answer_prefix > 0, "answer_prefix", "1 or more, or None")

    @property
    def is_identity(self) -> bool:
        return math.isinf(self.tau)

    @property
    def needs_tokenizer(self) -> bool:
        return self.answer_prefix is None

    def branches(self, family: Any) -> list[Branch]:
        return [
            Branch("image", text="edited"),
            Branch("question", image="none"),
            Branch("neither", image="none", text="edited"),
        ]

    def keep(self, main: Tensor) -> Tensor:
        return candidates(main, self.k, self.beta)

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        chosen = self.keep(main)
        both, image, question, neither = (logits.log_softmax(dim=-1) for logits in (main, *others))
        dividend = interaction(both, image, question, neither)
        gated = variance(dividend, chosen) > self.tau
        if self.prior == "softmax":
            dividend = dividend.masked_fill(~chosen, -math.inf).log_softmax(dim=-1).masked_fill(~chosen, 0)
        guided = contrast([main, dividend], [1.0, self.alpha], cut(chosen, view))
        return torch.where(gated, guided, main)

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        lengths = context.memory.setdefault("lengths", {})
        if branch.name == "image":
            span = question_span(tokens, context, self.answer_prefix)
            # A row without an image stays what it is in all branches: its interaction is 0.
            lengths[context.index] = (0, 0) if span is None else (span[1] - span[0], len(tokens) - span[1])
        # Counted from the end, where both kinds of prompt are alike.
        length, tail = lengths[context.index]
        stop = len(tokens) - tail
        return torch.cat([tokens[: stop - length], tokens[stop:]])
