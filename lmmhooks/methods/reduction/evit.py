"""
EViT: in a few layers of the vision tower, keep the patches the class token attends to and fuse the others into one.

Paper: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022,
arXiv 2202.07800. Code: github.com/youweiliang/evit (Apache-2.0; written from its description). The keep-rate warm-up
belongs to training and is left out; released classifiers were trained with the rate they run at, multimodal models were
not. Off the shelf the layers are the published ones scaled to the tower's depth, which nobody has published for
multimodal models, and no paper says how its "EViT" row was ported: UNVERIFIED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.selection import top_ascending
from lmmhooks.methods.reduction.tower import TowerMethod, TowerStep, TowerTokens, are_layers

__all__ = ["EViT", "fuse_rest"]


@dataclass(frozen=True)
class EViT(TowerMethod):
    """
    Token reorganisation between attention and MLP of the vision layers ``blocks``.

    ``keep`` is reached exactly, by about the same rate in every block; the fused token counts. The fused token is an
    ordinary patch for later blocks; it is shown at the place of the best patch that it holds. Towers without a class
    token rank by mean received attention (an extension of ours, UNVERIFIED).
    """

    id: ClassVar[str] = "evit"
    paper: ClassVar[str] = "Not All Patches are What You Need, ICLR 2022, arXiv 2202.07800"
    code: ClassVar[str] = "https://github.com/youweiliang/evit"

    keep_rate: float | None = setting(
        None,
        help="Instead of keep: share of the patches kept in every block, in (0, 1], rounded up; the fused token comes "
        "on top. None without keep: 0.7, the released default.",
    )
    blocks: Sequence[int] | None = setting(
        None,
        help="Vision layers that reduce, 0-based, ascending. None: a quarter, a half and three quarters of the depth "
        "(3, 6, 9 of 12 in the paper; 6, 12, 18 in CLIP-L, UNVERIFIED), as far as they feed the projector.",
    )
    fuse_token: bool = setting(
        True, help="Add one token, the sum of the dropped ones weighted by their attention (weights not renormalised)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.keep is None or self.keep_rate is None, "keep_rate", "None where keep is given")
        self._require(self.keep_rate is None or 0 < self.keep_rate <= 1, "keep_rate", "a share in (0, 1]")
        self._require(
            not (self.fuse_token and isinstance(self.keep, int)) or self.keep > 1,
            "keep",
            "2 or more with fuse_token, which takes one",
        )
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))
            self._require(are_layers(self.blocks), "blocks", "vision layers >= 0 in ascending order")

    @property
    def is_identity(self) -> bool:
        return super().is_identity or self.keep_rate == 1

    def check(self, family: Any) -> None:
        super().check(family)
        last = family.feature_layer
        fits = self.tower_layers(family)[-1] <= last
        self._require(fits, "blocks", f"vision layers 0 to {last}, which feed the projector of {family.name}")

    def tower_layers(self, family: Any) -> Sequence[int]:
        if self.blocks is not None:
            return self.blocks
        depth, last = len(family.vision_layers), family.feature_layer
        quarters = sorted({quarter * depth // 4 for quarter in (1, 2, 3)})
        return [layer for layer in quarters if layer <= last] or [last]

    def num_kept(self, num_left: int, num_patches: int, ordinal: int, num_blocks: int) -> int:
        """Patches that block ``ordinal`` keeps of those that are left, fused token not counted."""
        if self.keep is None:
            return math.ceil((0.7 if self.keep_rate is None else self.keep_rate) * num_left)
        target = max(self.target(num_patches), 1 + self.fuse_token)
        if ordinal < num_blocks - 1:
            # A hair less, so that a power which is whole but for rounding does not become one more.
            target = math.ceil(num_patches * (target / num_patches) ** ((ordinal + 1) / num_blocks) - 1e-9)
        return num_left if target >= num_left else target - self.fuse_token

    def reduce(self, tokens: TowerTokens) -> TowerStep | None:
        blocks = list(self.tower_layers(tokens.family))
        num_left = tokens.states.shape[1] - tokens.first
        num_keep = self.num_kept(num_left, tokens.num_patches, blocks.index(tokens.layer), len(blocks))
        if num_keep >= num_left:
            return None
        scores = tokens.saliency.mean(dim=1)
        kept = top_ascending(scores, num_keep)
        index = kept + tokens.first
        if tokens.first:
            index = torch.cat([torch.zeros_like(index[:, :1]), index], dim=1)
        step = tokens.take(index)
        if not self.fuse_token:
            return step
        fused, place = fuse_rest(tokens.states[:, tokens.first :], scores, kept)
        origin = tokens.origin.gather(1, place + tokens.first)
        return TowerStep(torch.cat([step.states, fused], dim=1), torch.cat([step.origin, origin], dim=1))


def fuse_rest(patches: Tensor, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """
    One token for the patches that are dropped.

    Parameters
    ----------
    patches
        ``[G, P, C]``.
    scores
        ``[G, P]`` float32, not negative.
    kept
        ``[G, K]`` long: patches that stay.

    Returns
    -------
    tuple
        ``[G, 1, C]`` sum weighted by the scores, which do not add up to 1; ``[G, 1]`` long: the best of them.
    """
    weights = scores.scatter(1, kept, 0.0)
    place = scores.scatter(1, kept, -1.0).argmax(dim=1, keepdim=True)
    return weights[:, None].to(patches.dtype) @ patches, place
