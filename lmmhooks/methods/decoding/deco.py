"""
DeCo: correct the prediction by the earlier layer that is surest of any plausible token.

Objects that are there are often more probable in layers before the last than in the last one. Among the candidates of
the final distribution (top-k, then top-p) the earlier layer is found that gives one of them the highest probability,
and its logits are added to the final ones, scaled by that probability. No extra forward: all early states of a step go
through the head in one product.

Differs from the released code: every row of a batch has its own candidates and its own layer in every mode of
generation (the release assumes one row but for beams), early logits are made at the newest token only, and the
published window of layers is scaled with the depth (UNVERIFIED at depths other than 32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import Method, setting
from lmmhooks.methods.decoding.base import DecodingMethod, contrast, cut
from lmmhooks.methods.decoding.early import chosen, within
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Deco", "candidates", "surest_layer"]


def candidates(main: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """
    The most probable tokens whose probabilities add up to a share, at most so many.

    Parameters
    ----------
    main
        float32 logits ``[B, vocabulary]``.
    top_k
        Most tokens; 0 for no limit.
    top_p
        Share in [0, 1]: the token with which the sum reaches it is the last one in.

    Returns
    -------
    Tensor or None
        Bool ``[B, vocabulary]``, at least one per row; of equally probable tokens the lower index is in first. None
        when nothing is cut off.
    """
    size = main.shape[-1]
    most = min(top_k or size, size)
    if most == size and top_p >= 1:
        return None
    probs = main.softmax(dim=-1)
    best = probs.topk(most, dim=-1).values
    # A token is in while those before it fall short of the share. Sums do not depend on the order of ties.
    before = best.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = -1.0
    inside = before < (top_p if top_p < 1 else torch.inf)
    num = inside.sum(dim=-1, keepdim=True)
    least = best.gather(-1, num - 1)
    above, level = probs > least, probs == least
    return above | (level & (level.cumsum(dim=-1) <= num - above.sum(dim=-1, keepdim=True)))


def surest_layer(early: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    The earlier layer that gives a candidate the highest probability.

    Parameters
    ----------
    early
        float32 logits ``[layers, B, vocabulary]``.
    keep
        The candidates, bool ``[B, vocabulary]``; None for all tokens.

    Returns
    -------
    layer
        Index into the layers, long ``[B]``; the first of equally sure ones.
    confidence
        Its probability of that candidate, ``[B]``.
    """
    probs = early.softmax(dim=-1)
    best = (probs if keep is None else probs.masked_fill(~keep, 0.0)).amax(dim=-1)
    layer = best.argmax(dim=0)
    return layer, best.gather(0, layer[None])[0]


@dataclass(frozen=True)
class Deco(DecodingMethod):
    """Dynamic correction decoding (see the module docstring)."""

    id: ClassVar[str] = "deco"
    paper: ClassVar[str] = (
        "MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation, ICLR 2025, arXiv 2410.11779"
    )
    code: ClassVar[str] = "https://github.com/zjunlp/Deco"
    lazy_allowed: ClassVar[bool] = False

    alpha: float = setting(0.6, help="Strength, 0 or more (scripts of the release: 0.6, its README: 0.5).")
    threshold_top_p: float = setting(0.9, help="Share of probability that candidates add up to, in [0, 1] (paper).")
    threshold_top_k: int = setting(20, help="Most candidates (paper); 0: no limit.")
    layers: tuple[int, ...] | None = setting(
        None,
        help="Earlier layers, as inputs of decoder layers (0: the embedding; the number of layers: the normed output). "
        "None: 20 ... 28 of 32 as published for 7B models, in proportion at another depth (UNVERIFIED).",
    )
    beta: float = field(default=0.0, init=False, repr=False)
    lazy: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(0 <= self.threshold_top_p <= 1, "threshold_top_p", "in [0, 1]")
        self._require(self.threshold_top_k >= 0, "threshold_top_k", "0 or more")

    def check(self, family: Any) -> None:
        if self.layers is not None:
            self._require(within(self.layers, family), "layers", f"in 0 ... {family.num_layers}, at least one")

    def bind(self, family: Any) -> Method:
        if self.layers is not None:
            return self
        first, stop = (round(family.num_layers * layer / 32) for layer in (20, 29))
        return replace(self, layers=tuple(range(first, max(stop, first + 1))))

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.threshold_top_k == 0 and self.threshold_top_p == 1

    def reads(self, family: Any) -> Sequence[int]:
        return (self.layers or ()) if self.alpha else ()

    def keep(self, main: Tensor) -> Tensor | None:
        return candidates(main, self.threshold_top_k, self.threshold_top_p)

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        keep = self.keep(main)
        if not self.alpha:
            return contrast([main], [1.0], cut(keep, view))
        assert self.layers is not None, "filled in by bind"
        early = view.early_logits(self.layers, normed=True).to(main.device)
        layer, confidence = surest_layer(early, keep)
        return contrast([main, chosen(early, layer)], [1.0, self.alpha * confidence[:, None]], cut(keep, view))
