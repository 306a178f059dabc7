"""
LOOK-M: once the prompt is read, keep all text and the most attended image tokens in the cache, fold the others in.

Paper: "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference", Findings of EMNLP
2024, arXiv 2406.18139. Code: github.com/SUSTechBruce/LOOK-M (implemented from its description).
Differs from the released code in that image tokens rank after text without a penalty on their scores: its -65516
swallows them in half precision, where tie order then chooses, and rounds them to 1/256 in float32. Images may have any
number of tokens; heads that share keys rank by their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.caching import CacheEntries, CacheMethod, Pairs

__all__ = ["LookM", "merge_pairs", "nearest"]

BLOCK = 512
"""Evicted entries compared at once; bounds the matrix of similarities on long prompts."""

NUM_FIRST = 4
"""Tokens that stay because they are first, where text has no priority (value of the released code)."""


@dataclass(frozen=True)
class LookM(CacheMethod):
    """
    Ranks by the attention an entry received from all prompt rows, per head, and merges what is evicted.

    Of N prompt tokens ``int(N * hh_ratio)`` heavy hitters and the last ``int(N * recent_ratio)`` stay. With
    ``text_prior`` all text counts as heavy hitters, so that image tokens stay only where text leaves room.
    """

    id: ClassVar[str] = "look-m"
    paper: ClassVar[str] = "LOOK-M, Findings of EMNLP 2024, arXiv 2406.18139"
    code: ClassVar[str] = "https://github.com/SUSTechBruce/LOOK-M"

    hh_ratio: float = setting(
        0.1, help="Share of the prompt's tokens kept by score, in (0, 1], rounded down; text counts among them."
    )
    recent_ratio: float = setting(0.1, help="Share kept because they come last, in [0, 1], rounded down.")
    merge: Literal["pivot", "average", "weighted", "none"] = setting(
        "pivot",
        help="How an evicted pair enters the kept one with the most similar key: 'pivot' half and half with it, then "
        "the mean (official script); 'average' the mean of all; 'weighted' the mean with evicted pairs times their "
        "similarity, below-average ones left out; 'none' evicts.",
    )
    text_prior: bool = setting(True, help="Keep all text; without it, the first 4 tokens and whatever scores best.")

    def __post_init__(self) -> None:
        self._require(0 < self.hh_ratio <= 1, "hh_ratio", "in (0, 1]")
        self._require(0 <= self.recent_ratio <= 1, "recent_ratio", "in [0, 1]")
        merges = ("pivot", "average", "weighted", "none")
        self._require(self.merge in merges, "merge", "one of " + ", ".join(map(repr, merges)))

    @property
    def is_identity(self) -> bool:
        return self.hh_ratio == 1 or self.recent_ratio == 1

    def num_keep(self, layers: Sequence[CacheEntries]) -> list[list[int]]:
        return [[self._size(visual) for visual in entries.rows] for entries in layers]

    def _size(self, visual: Tensor) -> int:
        """Entries kept of a row whose tokens are visual or not, ``[n]`` bool."""
        num_recent = int(len(visual) * self.recent_ratio)
        num_best = int(len(visual) * self.hh_ratio)
        if self.text_prior:
            num_best = max(num_best, int((~visual[: len(visual) - num_recent]).sum()))
        return min(len(visual), num_best + num_recent)

    def score(self, entries: CacheEntries, num_keep: Sequence[int]) -> Tensor:
        recent = entries.recent([int(len(visual) * self.recent_ratio) for visual in entries.rows])
        first = entries.valid & (entries.valid.cumsum(dim=1) <= NUM_FIRST)
        protected = ~entries.visual if self.text_prior else first
        scores = entries.received.masked_fill(protected[:, None], torch.finfo(torch.float32).max)
        return scores.masked_fill(recent[:, None], torch.inf)

    def fold(self, kept: Pairs, evicted: Pairs) -> tuple[Tensor, Tensor] | None:
        return None if self.merge == "none" else merge_pairs(kept, evicted, self.merge)


def nearest(kept: Pairs, evicted: Pairs) -> tuple[Tensor, Tensor]:
    """
    For every evicted key the most similar kept one.

    Returns
    -------
    tuple
        Cosine similarity ``[B, Hkv, E]`` float32, and which kept key it is, long; the lower index wins a tie.
    """
    tiny = torch.finfo(torch.float32).tiny
    wanted = kept.keys.float()
    wanted = (wanted / wanted.norm(dim=-1, keepdim=True).clamp(min=tiny)).transpose(2, 3)
    hidden = ~kept.real[:, None, None, :]
    found = []
    for start in range(0, evicted.keys.shape[2], BLOCK):
        block = evicted.keys[:, :, start : start + BLOCK].float()
        block = block / block.norm(dim=-1, keepdim=True).clamp(min=tiny)
        found.append((block @ wanted).masked_fill(hidden, -torch.inf).max(dim=-1))
    return torch.cat([part.values for part in found], dim=-1), torch.cat([part.indices for part in found], dim=-1)


def merge_pairs(kept: Pairs, evicted: Pairs, merge: Literal["pivot", "average", "weighted"]) -> tuple[Tensor, Tensor]:
    """
    Kept keys and values with the evicted ones folded into them; keys alone decide which goes where.

    Parameters
    ----------
    kept, evicted
        Of one layer; computed with in float32.
    merge
        See `LookM`.

    Returns
    -------
    tuple
        Keys and values ``[B, Hkv, K, d]`` in their dtypes; pairs into which nothing was folded are unchanged.
    """
    similarity, pivot = nearest(kept, evicted)
    counted = evicted.real[:, None].expand_as(pivot)
    if merge == "weighted":
        # As released: entry j of every head's own evicted ones is judged by its mean over the heads.
        known = similarity.masked_fill(~counted, 0)
        total = known.sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp(min=1)
        counted = counted & (known.mean(dim=1) >= total[:, None])[:, None]
    num = torch.ones_like(similarity[:, :, :1]).expand(*pivot.shape[:2], kept.keys.shape[2])
    num = num.scatter_add(2, pivot, counted.float())[..., None]

    def folded(own: Tensor, others: Tensor) -> Tensor:
        index = pivot[..., None].expand_as(others)
        mine, added = own.float(), others.float()
        if merge == "pivot":
            added = (added + mine.gather(2, index)) / 2
        elif merge == "weighted":
            added = added * similarity[..., None]
        return (mine.scatter_add(2, index, added * counted[..., None]) / num).to(own.dtype)

    return folded(kept.keys, evicted.keys), folded(kept.values, evicted.values)
