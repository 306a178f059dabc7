"""
SparseVLM: text that has to do with the image judges visual tokens; some of those that go are merged instead.

Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv
2410.04417. Code: github.com/Gumpest/SparseVLMs (Apache-2.0, implemented from its description), releases 1.0, 1.5, 2.0.
Follows the code where the paper differs (means instead of sums, Euclidean assignment, published tables instead of the
rank rule since 1.5). Differs from the code in that ties in clustering go to the lower index (it adds random noise,
which decides the result of two clusters), that the correction of 2.0 is clamped where it would divide by zero or less,
that 2.0 averages half of the heads whatever their number, and that a table entry of all tokens changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe, RowsRead
from lmmhooks.methods.reduction.base import Cut, Scope, TokenGroup
from lmmhooks.methods.reduction.clustering import cluster_means, density_peaks
from lmmhooks.methods.reduction.raters import EMBEDDINGS, RATERS, judged, judged_per_head, judged_per_row
from lmmhooks.methods.reduction.selection import top_ascending
from lmmhooks.methods.reduction.staging import StagedMethod, scaled_layers

__all__ = ["SparseVLM", "best_heads", "recycle", "recycled_counts"]

#: Tokens kept of 576 behind every layer, by release and label.
TABLES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
TABLE_TOKENS = 576


def recycled_counts(num_pruned: int, tau: float, theta: float) -> tuple[int, int]:
    """Of so many pruned tokens, how many are merged, and into how many."""
    recycled = min(int(num_pruned * tau) + 1, num_pruned)
    return recycled, min(int(recycled * theta) + 1, recycled)


def recycle(scores: Tensor, states: Tensor, num_keep: int, recycled: int, clusters: int) -> tuple[Tensor, Tensor]:
    """
    The best tokens, and the best of the others merged.

    Parameters
    ----------
    scores
        ``[G, V]``.
    states
        ``[G, V, D]``.
    num_keep, recycled, clusters
        Tokens that stay as they are, tokens that are merged, merged tokens.

    Returns
    -------
    tuple
        Indices ``[G, num_keep + clusters]`` (kept ones in ascending order, then the centre of every cluster), and the
        merged states ``[G, clusters, D]``.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :num_keep].sort(dim=1).values
    merged = order[:, num_keep : num_keep + recycled]
    members = states.gather(1, merged[..., None].expand(-1, -1, states.shape[-1]))
    centres, cluster = density_peaks(members, clusters)
    return torch.cat([kept, merged.gather(1, centres)], dim=1), cluster_means(members, cluster, clusters)


def best_heads(scores: Tensor, num_heads: int) -> Tensor:
    """Mean ``[G, V]`` over the heads of ``scores [G, V, H]`` with the largest totals; the lower head wins a tie."""
    best = scores.sum(dim=1).sort(dim=1, descending=True, stable=True).indices[:, :num_heads]
    return scores.gather(2, best[:, None].expand(-1, scores.shape[1], -1)).mean(dim=-1)


@dataclass(frozen=True)
class SparseVLM(StagedMethod):
    """
    After every layer in ``layers``, ranks by that layer's attention from rater tokens.

    Raters are chosen once, on the embeddings. Every image is reduced on its own; merged tokens stand behind the others
    of their image. Published labels count the shortened sequence as if the judging layer had seen it: 192, 128, 96 and
    64 are averages of 206.5, 145.4, 114.1 and 82.2 tokens; ``budget`` counts what enters.
    """

    id: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, ICML 2025, arXiv 2410.04417"
    code: ClassVar[str] = "https://github.com/Gumpest/SparseVLMs"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "v1.0-mme": {"version": "1.0", "scale": 13.5, "bias": 0},
        "v1.0-pope": {"version": "1.0", "scale": 9.0, "bias": 6},
        "v1.0-textvqa": {"version": "1.0", "scale": 0.8, "bias": 0},
    }
    published_layers: ClassVar[tuple[int, ...]] = (2, 6, 15)

    version: Literal["1.0", "1.5", "2.0"] = setting(
        "1.5",
        help="Release: '1.5' keeps published numbers and merges; '1.0' keeps scale * rank + bias of the raters' "
        "attention, which waits for the device in every stage; '2.0' merges nothing, corrects for distance and reads "
        "half of the heads.",
    )
    table: Any = setting(
        192,
        help="Tokens kept of 576 behind every layer, scaled to what an image has: a published label (192, 128, 96, 64) "
        "or a list with one number per layer. Not for '1.0'; ignored under a budget.",
    )
    tau: float = setting(0.3, help="Share of the pruned tokens that is merged, in [0, 1]; 1.x. Code: 0.3.")
    theta: float = setting(0.1, help="Merged tokens per token merged, in [0, 1]; 1.x. Code: 0.1.")
    scale: float = setting(13.5, help="Tokens kept per rank, > 0; '1.0'. Code: 13.5 for MME, 9 for POPE, 0.8 TextVQA.")
    bias: int = setting(0, help="Added to that; '1.0'. Code: 0 for MME, 6 for POPE, 0 for TextVQA.")
    gravity: bool = setting(
        True, help="'2.0': divide attention by what rotary embedding alone makes of distance (1-D positions)."
    )
    least: float = setting(
        0.01, help="'2.0': smallest divisor, > 0. The release has none and flips signs beyond about 1,700 tokens."
    )

    def __post_init__(self) -> None:
        if isinstance(self.table, (list, tuple)):
            object.__setattr__(self, "table", tuple(self.table))
        super().__post_init__()
        self._require(self.version in ("1.0", "1.5", "2.0"), "version", "'1.0', '1.5' or '2.0'")
        self._require(0 <= self.tau <= 1, "tau", "in [0, 1]")
        self._require(0 <= self.theta <= 1, "theta", "in [0, 1]")
        self._require(self.scale > 0, "scale", "> 0")
        self._require(self.least > 0, "least", "> 0")
        if self.version == "1.0":
            self._require(self.budget is None, "budget", "left out: version='1.0' lets the rank decide how many stay")
            return
        wanted = 3 if self.layers is None else len(self.layers)
        numbers = self._table()
        valid = len(numbers) == wanted and all(isinstance(n, int) and 0 <= n <= TABLE_TOKENS for n in numbers)
        valid = valid and sorted(numbers, reverse=True) == list(numbers)
        labels = ", ".join(map(str, TABLES[self.version]))
        self._require(valid, "table", f"{labels} or {wanted} numbers of 576 that do not rise, one per layer")

    def _table(self) -> tuple[int, ...]:
        return self.table if isinstance(self.table, tuple) else TABLES[self.version].get(self.table, ())

    @property
    def scope(self) -> Scope:
        return "image"

    def repacks(self, family: Any) -> bool:
        return self.positions == "repack" or (self.positions == "auto" and not family.mrope and self.version != "2.0")

    def check(self, family: Any) -> None:
        super().check(family)
        if self.version == "2.0" and self.gravity and family.mrope:
            raise MethodError(
                f"{self.id}: version='2.0' corrects attention for one-dimensional distances, which {family.name} does "
                "not have; use gravity=False or version='1.5'"
            )

    def stage_layers(self, family: Any) -> tuple[int, ...]:
        if self.layers is None and self.version == "1.0":
            return scaled_layers((*self.published_layers, 19), family.num_layers)
        return super().stage_layers(family)

    def cuts(self, family: Any) -> list[Cut]:
        layers = self.stage_layers(family)
        keep: list[float | None] = [None] * len(layers)
        if self.version != "1.0":
            keep = [number / TABLE_TOKENS for number in self._table()]
        stages = zip(layers, keep, strict=True)
        return [Cut(layer + 1, share) for layer, share in stages if layer + 1 < family.num_layers]

    def probes(self, family: Any) -> list[Probe]:
        found = [self._probe(cut.layer) for cut in self.cuts(family)]
        return [EMBEDDINGS, RATERS, *found] if found else []

    def _probe(self, layer: int) -> Probe:
        reduce: Callable[[RowsRead], Tensor] = judged_per_row if self.version == "1.0" else judged
        if self.version == "2.0":
            reduce = partial(judged_per_head, correct=self.gravity, least=self.least)
        return Probe("decoder_rows", layer - 1, "after_image", reduce=reduce, label=f"raters {self.version}")

    def count(self, share: float, num_tokens: int) -> int:
        return int(share * num_tokens + 1e-9)

    def select(self, tokens: TokenGroup) -> Tensor:
        index, tokens.scratch["merged"] = self._choose(tokens)
        return index

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor | None:
        return tokens.scratch["merged"]

    def _choose(self, tokens: TokenGroup) -> tuple[Tensor, Tensor | None]:
        """Indices, and the states of all of them where some are merged."""
        scores = tokens.probes[self._probe(tokens.layer).name]
        if self.version == "2.0":
            heads = max(1, scores.shape[2] // 2)
            return top_ascending(best_heads(scores, heads), tokens.num_keep), None
        if self.version == "1.0":
            return self._by_rank(tokens, scores)
        num_keep, recycled, clusters = self._counts(scores.shape[1], tokens.num_keep)
        index, merged = recycle(scores, tokens.states, num_keep, recycled, clusters)
        return index, _with_merged(tokens.states, index, merged)

    def _counts(self, num_tokens: int, num_keep: int) -> tuple[int, int, int]:
        """Tokens kept, merged, and made of those; under a budget, merged ones count among what may stay."""
        if self.budget is None:
            return num_keep, *recycled_counts(num_tokens - num_keep, self.tau, self.theta)
        for kept in range(num_keep - 1, -1, -1):
            recycled, clusters = recycled_counts(num_tokens - kept, self.tau, self.theta)
            if kept + clusters <= num_keep:
                return kept, recycled, clusters
        return 0, recycled, num_keep

    def _by_rank(self, tokens: TokenGroup, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As many as the rank of the raters' attention says, other numbers for every image: waits for the device."""
        num_tokens = rows.shape[1]
        scores = rows.sum(dim=2)
        ranks = torch.linalg.matrix_rank(rows.transpose(1, 2)).tolist()
        found: list[tuple[Tensor, Tensor]] = []
        for group, rank in enumerate(ranks):
            states = tokens.states[group : group + 1]
            if rank == num_tokens:
                found.append((torch.arange(num_tokens, device=rows.device)[None], states.float()))
                continue
            num_keep = max(0, min(int(rank * self.scale + self.bias), num_tokens - 1))
            counts = recycled_counts(num_tokens - num_keep, self.tau, self.theta)
            index, merged = recycle(scores[group : group + 1], states, num_keep, *counts)
            found.append((index, _with_merged(states, index, merged)))
        most = max(index.shape[1] for index, _ in found)
        pad = torch.nn.functional.pad
        index = torch.cat([pad(index, (0, most - index.shape[1]), value=-1) for index, _ in found])
        return index, torch.cat([pad(states, (0, 0, 0, most - states.shape[1])) for _, states in found])


def _with_merged(states: Tensor, index: Tensor, merged: Tensor) -> Tensor:
    """States ``[G, K, D]`` at ``index``, the last of them replaced by merged ones."""
    kept = index[:, : index.shape[1] - merged.shape[1]]
    own = states.gather(1, kept[..., None].expand(-1, -1, states.shape[-1]))
    return torch.cat([own.float(), merged], dim=1)
