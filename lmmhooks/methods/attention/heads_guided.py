"""
Heads-guided intervention: lift image regions that many heads look at, in every head.

In the middle layers, where visual information enters the text, hallucinated words come from heads that look at places
the others do not. To the logits of image keys in the row that predicts the next token, every head adds
``alpha * mean over heads of |l|`` of that key. Consistent with the released code as far as both were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmmhooks.methods.attention.base import AttentionContext
from lmmhooks.methods.attention.boosting import BoostMethod
from lmmhooks.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HeadsGuided", "share_among_heads"]


def share_among_heads(scores: Tensor, visual: Tensor, alpha: float) -> Tensor:
    """
    Add ``alpha`` times the head mean of the magnitude to the logits of visual keys.

    Parameters
    ----------
    scores
        ``[B, H, R, N]`` float32, H query heads; changed in place.
    visual
        ``[B, N]`` bool.
    alpha
        0 or more.
    """
    # Masked before the mean: hidden keys hold the smallest float32, of which a sum over heads overflows.
    seen = scores.abs().masked_fill_(~visual[:, None, None, :], 0)
    return scores.add_(seen.mean(dim=1, keepdim=True), alpha=alpha)


@dataclass(frozen=True)
class HeadsGuided(BoostMethod):
    """Heads-guided attention intervention (see the module docstring)."""

    id: ClassVar[str] = "heads-guided"
    paper: ClassVar[str] = (
        "Devils in Middle Layers of Large Vision-Language Models: Interpreting, Detecting and Mitigating Object "
        "Hallucinations via Attention Lens, CVPR 2025, arXiv 2411.16724"
    )
    code: ClassVar[str] = "https://github.com/ZhangqiJiang07/middle_layers_indicating_hallucinations"
    published: ClassVar[tuple[int, int | None]] = (5, 18)

    alpha: float = setting(0.5, help="Factor on the head mean, 0 or more (released code: 0.5).")
    start: int | None = setting(
        None,
        help="First edited layer, 0-based. None: 5 of 32 layers as published, scaled with depth for other decoders.",
    )
    end: int | None = setting(
        None, help="One past the last edited layer. None: 19 of 32 layers as published (5 to 18), scaled alike."
    )

    def __post_init__(self) -> None:
        self._require(self.alpha >= 0, "alpha", "0 or more")

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0

    def edit_scores(self, scores: Tensor, context: AttentionContext) -> Tensor:
        return share_among_heads(scores, context.layout.visual, self.alpha)
