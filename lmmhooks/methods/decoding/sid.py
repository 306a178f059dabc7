"""
SID: subtract what the model would say if it saw only the visual tokens it cares least about.

The model itself ranks visual tokens by attention. A branch in which, behind the early layers, all but the least
attended ones are hidden hallucinates by association, and is what the main prediction is pushed away from.

Paper: "Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models", ICLR 2025,
arXiv 2408.02032. Code: https://github.com/huofushuo/SID. As there, nothing leaves the sequence, every forward ranks
anew by its newest token, and strength and cut are the effective ones of its scripts (their own options are parsed and
not passed on). Differs in that padding is respected and any batch, image span and number of images goes (the release
selects by the first row and ignores padding), and that greedy decoding respects the cut; preset ``released-greedy``
does without, as the release does. The random subset of its layer 0 is left out.

Layers before the first with hidden tokens say the same in both branches and are computed for both none the less, which
is 3 % of reading a prompt at 32 layers and nothing per token (docs/decisions/0011-what-branches-are-not-spared.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import BranchAttention, StepView

__all__ = ["Sid", "hidden_tokens"]


def hidden_tokens(attention: Tensor, visual: Tensor, num_shown: Tensor) -> Tensor:
    """
    Visual tokens to hide: all but the least attended ones.

    Parameters
    ----------
    attention
        ``[..., N]``, head mean, one row per query.
    visual
        Bool, like ``attention``: its visual tokens.
    num_shown
        Long ``[..., 1]``: how many of them stay visible; all where there are fewer.

    Returns
    -------
    Tensor
        Bool like ``attention``; of equally attended tokens the earlier ones stay visible.
    """
    order = attention.masked_fill(~visual, torch.inf).sort(dim=-1, stable=True).indices
    places = torch.arange(attention.shape[-1], device=attention.device).expand_as(order)
    rank = torch.empty_like(order).scatter(-1, order, places)
    return visual & (rank >= num_shown)


@dataclass(frozen=True)
class Sid(DecodingMethod):
    """Contrast with the least attended visual tokens: ``(1 + alpha) L - alpha L_least`` on plausible tokens."""

    id: ClassVar[str] = "sid"
    paper: ClassVar[str] = "Self-Introspective Decoding, ICLR 2025, arXiv 2408.02032"
    code: ClassVar[str] = "https://github.com/huofushuo/SID"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pope-script": {"num_keep": 100},  # of 576 visual tokens
        "chair-script": {"num_keep": 50},
        "released-greedy": {"beta": 0.0},  # its greedy search takes the largest contrast, plausible or not
    }

    alpha: float = setting(
        0.5,
        help="Strength of the contrast, 0 or more (0.5 is what the released scripts end up with, whatever --cd-alpha "
        "says); 0: no branch.",
    )
    keep_ratio: float = setting(
        100 / 576,
        help="Share in (0, 1] of a row's visual tokens that stay visible in the branch, rounded down, at least 1 (POPE "
        "script on LLaVA-1.5: 100 of 576).",
    )
    num_keep: int | None = setting(
        None, help="Instead of the share, how many stay visible, 1 or more (scripts: 100 for POPE, 50 for CHAIR)."
    )
    layer: int = setting(
        2,
        help="First decoder layer with hidden tokens, 0-based, 1 or more; the layer before it ranks them (scripts: 2; "
        "the paper's text says about 3, UNVERIFIED).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(0 < self.keep_ratio <= 1, "keep_ratio", "in (0, 1]")
        counted = self.num_keep is None or (isinstance(self.num_keep, int) and self.num_keep >= 1)
        self._require(counted, "num_keep", "an integer, 1 or more, or None")
        self._require(isinstance(self.layer, int) and self.layer >= 1, "layer", "an integer, 1 or more")

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def check(self, family: Any) -> None:
        if self.layer >= family.num_layers:
            raise MethodError(
                f"{self.id}: layer={self.layer} is not in the decoder, which has layers 0 to {family.num_layers - 1}"
            )

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("least")] if self.alpha else []

    def branch_layers(self, family: Any) -> Sequence[int]:
        return range(self.layer - 1, family.num_layers) if self.alpha else ()

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1 + self.alpha, -self.alpha]

    def hide_keys(self, call: BranchAttention, branch: Branch) -> Tensor | None:
        if call.layer >= self.layer:
            return call.from_earlier("hidden")
        # While a prompt is read, its last token ranks for all rows; tokens that continue it rank for themselves.
        batch, _, num_queries, _ = call.query.shape
        rows = torch.arange(num_queries, device=call.query.device).expand(batch, -1)
        if call.is_prefill:
            rows = call.layout.last.to(torch.uint8).argmax(dim=1, keepdim=True)
        visual = call.layout.visual[:, None]
        num_visual = visual.sum(dim=-1, keepdim=True)
        if self.num_keep is None:
            # A share such as 100 / 576 must give back the number it was made of, whatever the last bit says.
            num_shown = (num_visual.double() * self.keep_ratio + 1e-6).long().clamp(min=1)
        else:
            num_shown = torch.full_like(num_visual, self.num_keep)
        attention = call.weights_of(rows).mean(dim=1)
        call.keep_for_later("hidden", hidden_tokens(attention, visual.expand_as(attention), num_shown))
        return None
