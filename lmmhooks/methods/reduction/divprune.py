"""
DivPrune: keep tokens that are as different from each other as possible.

Attention-free and text-free: greedily maximises the smallest cosine distance between kept tokens of an image.

Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv 2503.02175. Code:
github.com/vbdi/divprune (CC-BY-NC; implemented from its description). Differs from the released code in float32
distances, and in that a chosen token cannot be chosen again among duplicates, so that the number kept is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.base import Newline, ReductionMethod, TokenGroup
from lmmhooks.methods.reduction.greedy import cosine, max_min

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(ReductionMethod):
    """
    Max-min diverse tokens of every image before the decoder, distances between projected features.

    The first token is the one whose nearest neighbour is farthest. A share is rounded to the nearest token. All crops
    of an image compete, newline tokens among them, as released; 0.1 is the share published for video.
    """

    id: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune: Diversity-based Visual Token Pruning, CVPR 2025, arXiv 2503.02175"
    code: ClassVar[str] = "https://github.com/vbdi/divprune"

    keep: int | float | None = setting(
        0.098, help="Visual tokens kept: a count per image, or a share in (0, 1] of its tokens (paper, images: 0.098)."
    )
    newline: Newline = setting(
        "rank", help="Newline tokens: 'rank' them as released; or 'drop', 'keep_per_row', 'per_kept_row'."
    )
    order: Literal["raster", "selection"] = setting(
        "raster",
        help="Order for the decoder: 'raster' as released, 'selection' as the paper's figures were produced.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.order in ("raster", "selection"), "order", "'raster' or 'selection'")

    def count(self, share: float, num_tokens: int) -> int:
        return max(1, round(share * num_tokens))

    def select(self, tokens: TokenGroup) -> Tensor:
        index = max_min(1 - cosine(tokens.states), tokens.num_keep)
        return index if self.order == "selection" else index.sort(dim=1).values
