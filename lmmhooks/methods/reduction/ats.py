"""
ATS: sample the patches of a vision layer by inverse transform; images with little in them keep fewer.

Patches are scored by class attention times the norm of their value. The scores' cumulative distribution is read at
evenly spaced levels; levels that meet the same patch collapse, and what no level meets leaves.

Paper: "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, arXiv 2111.15667. Code:
github.com/adaptivetokensampling/ATS (Apache-2.0; written from its description). The release samples only as many levels
as there are tokens or more, for less its shapes break; fewer levels are the paper's way to a smaller budget, and work
here. Equal to the release otherwise. Two consequences of its formula: the patch that ranks last always leaves, and
levels begin at the least positive value of the distribution, which was not checked against the paper (UNVERIFIED).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.tower import TowerMethod, TowerStep, TowerTokens, are_layers

__all__ = ["ATS", "sample_inverse", "stabilised_attention"]

EPSILON = 1e-6
"""Of the released attention, in numerator and denominator."""


@dataclass(frozen=True)
class ATS(TowerMethod):
    """
    Inverse-transform sampling behind the attention of the vision layers ``blocks``; the class token always stays.

    How many patches are left depends on the image: at most one per level, and fewer where attention is peaked, which it
    is in CLIP. Towers without a class token score by mean received attention (an extension of ours, UNVERIFIED).
    """

    id: ClassVar[str] = "ats"
    paper: ClassVar[str] = "Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022, arXiv 2111.15667"
    code: ClassVar[str] = "https://github.com/adaptivetokensampling/ATS"

    # The image decides.
    keep: int | float | None = field(default=None, init=False, repr=False)

    num_samples: int | float | None = setting(
        None,
        help="Levels in every block, class token included: a count of 3 or more, or a share in (0, 1] of the tokens "
        "before any reduction. None: all of them, as released.",
    )
    min_tokens: int = setting(
        1, help="Patches left at least, the best by score where sampling meets fewer; >= 1 (released: no floor)."
    )
    blocks: Sequence[int] | None = setting(
        None,
        help="Vision layers that sample, 0-based, ascending. None: from a quarter of the depth on (3 to 11 of 12 as "
        "released), as far as they feed the projector.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        samples = self.num_samples
        share = isinstance(samples, float) and 0 < samples <= 1
        count = isinstance(samples, int) and not isinstance(samples, bool) and samples >= 3
        self._require(samples is None or share or count, "num_samples", "a count >= 3 or a share in (0, 1]")
        self._require(self.min_tokens >= 1, "min_tokens", ">= 1")
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))
            self._require(are_layers(self.blocks), "blocks", "vision layers >= 0 in ascending order")

    def check(self, family: Any) -> None:
        super().check(family)
        last = family.feature_layer
        fits = self.tower_layers(family)[-1] <= last
        self._require(fits, "blocks", f"vision layers 0 to {last}, which feed the projector of {family.name}")

    def tower_layers(self, family: Any) -> Sequence[int]:
        if self.blocks is not None:
            return self.blocks
        last = family.feature_layer
        return range(min(len(family.vision_layers) // 4, last), last + 1)

    def levels(self, num_slots: int, has_cls: bool) -> int:
        """Levels that are read for a crop of so many tokens."""
        samples = self.num_samples
        if isinstance(samples, float):
            samples = max(3, round(samples * num_slots))
        return (num_slots if samples is None else samples) - has_cls

    def reduce(self, tokens: TowerTokens) -> TowerStep | None:
        first = tokens.first
        if first:
            attention = stabilised_attention(tokens.logits(slice(0, 1))[:, :, 0], tokens.valid)[..., 1:]
        else:
            attention = tokens.saliency
        norms = tokens.value[:, :, first:].transpose(1, 2).flatten(2).float().norm(dim=-1)
        scores = attention.sum(dim=1) * norms
        real = None if tokens.valid is None else tokens.valid[:, first:]
        if real is not None:
            scores = scores.masked_fill(~real, 0.0)
        mask = sample_inverse(scores, self.levels(tokens.num_slots, bool(first)), self.min_tokens, real)
        if first:
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        return tokens.keep(mask)[0]


def stabilised_attention(logits: Tensor, valid: Tensor | None) -> Tensor:
    """
    Attention weights of rows ``[G, H, t]`` as released: a little is added to every weight and to their sum.

    ``valid [G, t]`` tells tokens from padding.
    """
    raised = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    length: Tensor | int = logits.shape[-1]
    if valid is not None:
        raised = raised * valid[:, None]
        length = valid.sum(dim=1)[:, None, None]
    return (raised + EPSILON / length) / (raised.sum(dim=-1, keepdim=True) + EPSILON)


def sample_inverse(scores: Tensor, num_levels: int, min_tokens: int = 1, real: Tensor | None = None) -> Tensor:
    """
    Patches that evenly spaced levels of the cumulative distribution of the scores meet.

    Parameters
    ----------
    scores
        ``[G, P]`` float32, not negative, 0 for padding.
    num_levels
        At least 2; the last one meets the best patch.
    min_tokens
        Where fewer are met, the best of the others join them.
    real
        ``[G, P]`` bool: no padding; None where there is none.

    Returns
    -------
    Tensor
        ``[G, P]`` bool.
    """
    share, order = (scores / scores.sum(dim=1, keepdim=True)).sort(dim=1, stable=True)
    cumulative = share.cumsum(dim=1)
    if real is not None:
        # Padding sorts first, as scores of 0 do, and must not be met nor shift where the distribution begins.
        solid = real.gather(1, order)
        cumulative = cumulative.masked_fill(~solid, torch.inf)
    start = cumulative.amin(dim=1, keepdim=True)
    end = cumulative[:, -1:]
    cumulative = (cumulative - start) / (end - start).clamp(min=torch.finfo(torch.float32).tiny)
    lowest = cumulative.masked_fill(cumulative <= 0, torch.inf).amin(dim=1, keepdim=True).clamp(max=1.0)
    steps = torch.arange(num_levels, device=scores.device) / (num_levels - 1)
    levels = lowest + (1 - lowest) * steps
    met = (levels[:, :, None] - cumulative[:, None]).abs().argmin(dim=2)
    sampled = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order.gather(1, met), True)
    if min_tokens == 1:
        return sampled
    # Sampled patches first, then the others by score.
    rank = (scores + 2 * scores.amax(dim=1, keepdim=True) * sampled).sort(dim=1, descending=True, stable=True).indices
    floor = torch.arange(scores.shape[1], device=scores.device) < min_tokens
    topped = torch.zeros_like(sampled).scatter(1, rank, floor.expand_as(sampled))
    return sampled | (topped if real is None else topped & real)
