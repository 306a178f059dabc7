"""
VL-Cache: keep what the question attends to, and give layers with dense attention more of the budget.

Paper: "VL-Cache: Sparsity and Modality-Aware KV Cache Compression for VLM Inference Acceleration", ICLR 2025, arXiv
2410.23317. No official code. UNVERIFIED, taken from summaries of the paper and therefore settings: the threshold
``p``, the recent window, and the bounds of a layer's share. Differs from the paper in that ``alpha=1`` compresses
nothing, where its formula would take entries from sparse layers; evicting while the answer grows is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.caching import CacheEntries, CacheMethod

__all__ = ["VLCache", "layer_shares"]


@dataclass(frozen=True)
class VLCache(CacheMethod):
    """
    Ranks entries by attention of the prompt rows after the last image, per head, summed over heads that share a key.

    A layer's share follows its density: the part of those rows' weights that reach ``p`` times the largest of their
    row. With several images, text between them is ranked like image tokens.
    """

    id: ClassVar[str] = "vl-cache"
    paper: ClassVar[str] = "VL-Cache, ICLR 2025, arXiv 2410.23317"
    needs_all_layers: ClassVar[bool] = True

    alpha: float = setting(0.1, help="Share of the prompt's entries kept over all layers, in (0, 1] (paper: 0.01-0.4).")
    p: float = setting(
        0.01,
        help="A weight below p times the largest of its row counts as zero, in (0, 1). UNVERIFIED: from summaries.",
    )
    recent_ratio: float = setting(
        0.1, help="Share of a layer's kept entries that are its last ones, in [0, 1], rounded down. UNVERIFIED."
    )
    min_keep: float = setting(0.01, help="Least share of entries a layer keeps, in (0, 1]. UNVERIFIED.")
    n_min: int = setting(
        1, help="The last n_min prompt rows rank too, for questions of few tokens; >= 1 (paper: text after the image)."
    )

    def __post_init__(self) -> None:
        self._require(0 < self.alpha <= 1, "alpha", "in (0, 1]")
        self._require(0 < self.p < 1, "p", "in (0, 1)")
        self._require(0 <= self.recent_ratio <= 1, "recent_ratio", "in [0, 1]")
        self._require(0 < self.min_keep <= 1, "min_keep", "in (0, 1]")
        self._require(isinstance(self.n_min, int) and self.n_min >= 1, "n_min", "an integer >= 1")

    @property
    def is_identity(self) -> bool:
        return self.alpha == 1 or self.min_keep == 1

    @property
    def rows(self) -> str:
        return f"after_last_image+{self.n_min}"

    def tally(self, weights: Tensor, real: Tensor) -> dict[str, Tensor]:
        reaching = (weights >= self.p * weights.amax(dim=-1, keepdim=True)).sum(dim=(1, 3))
        return {**super().tally(weights, real), "reaching": (reaching * real).sum(dim=1)}

    def num_keep(self, layers: Sequence[CacheEntries]) -> list[list[int]]:
        reaching = torch.stack([entries.tallies["reaching"].to(layers[0].valid.device) for entries in layers])
        # A row sees what stands before it and itself, in every head.
        pairs = torch.stack(
            [
                (entries.valid.cumsum(dim=1) * entries.read).sum(dim=1) * entries.tallies["received"].shape[1]
                for entries in layers
            ]
        )
        reaching, pairs = torch.stack([reaching, pairs.to(reaching.device)]).cpu().double()
        shares = layer_shares(reaching / pairs.clamp(min=1), self.alpha, self.min_keep).tolist()
        return [
            # 0.1 * 30 is a little more than 3 in binary; the user means 3.
            [math.ceil(share * len(row) - 1e-9) for share, row in zip(of_layer, entries.rows, strict=True)]
            for of_layer, entries in zip(shares, layers, strict=True)
        ]

    def score(self, entries: CacheEntries, num_keep: Sequence[int]) -> Tensor:
        recent = entries.recent([int(self.recent_ratio * num + 1e-9) for num in num_keep])
        return entries.received.masked_fill(recent[:, None], torch.inf)


def layer_shares(density: Tensor, alpha: float, min_keep: float) -> Tensor:
    """
    Share of its entries that every layer keeps.

    Parameters
    ----------
    density
        ``[L, B]``: part of the visible weights that are not near zero, ``1 - gamma``.
    alpha
        Mean share over the layers before clipping.
    min_keep
        Least share.

    Returns
    -------
    Tensor
        ``[L, B]`` in [min_keep, 1], proportional to density between the bounds.
    """
    total = density.sum(dim=0).clamp(min=torch.finfo(density.dtype).tiny)
    return (density / total * alpha * density.shape[0]).clamp(min_keep, 1)
