"""
PruMerge: keep the outliers of class-token attention, each with its nearest neighbours folded in.

Attention of the class token is sparse: how many patches stand out decides how many an image keeps. What leaves is added
to the kept tokens it resembles, and once more, all together, as a last token. PruMerge+ adds patches at regular places.

Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025, arXiv 2403.15388.
Code: github.com/42Shawn/LLaVA-PruMerge (Apache-2.0). As there, attention is that of one head as wide as the tower's
last layer, weights are raw attention, not normalised, and tokens go to the decoder in the order of attention. Differs
where the released code divides by zero (no outlier: one token stays) or where nothing would leave (the last sample
does, so that the sum has a place). Fine-tuning, which the paper's main figures use, is out of scope.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, Cut, TokenGroup
from lmmhooks.methods.reduction.merging import embed, feature_probes, features
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["PruMerge", "absorbed_features", "num_outliers", "prumerge_indices", "sample_strides"]


@dataclass(frozen=True)
class PruMerge(CropwiseMethod):
    """
    Outliers (and, with ``plus``, samples of the grid) of every crop, merged, and one token for all that leave.

    Without settings the image decides how many stay: about 32 of 576, with ``plus`` about 144. A number can be given
    as ``keep`` or a budget, which counts everything, or as ``num_top``, which counts as the released code does. Presets
    ``vtc-cls-64``, ``-128`` and ``-256`` are the fixed sizes of PruMerge+ that later papers compare with (released with
    VTC-CLS; they come to 64, 133 and 255 tokens, give or take a few).

    Every crop is reduced on its own; those that a model unpadded have fewer candidates. Towers without a class token
    are scored by the attention a patch receives in their last layer: UNVERIFIED. Where several patches make a token
    (Qwen, InternVL, OneVision) the tokens' states are merged.
    """

    id: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "LLaVA-PruMerge: Adaptive Token Reduction, ICCV 2025, arXiv 2403.15388"
    code: ClassVar[str] = "https://github.com/42Shawn/LLaVA-PruMerge"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vtc-cls-64": {"plus": True, "num_top": 13, "stride": 11},
        "vtc-cls-128": {"plus": True, "num_top": 40, "stride": 6},
        "vtc-cls-256": {"plus": True, "num_top": 95, "stride": 3},
    }

    keep: int | float | None = setting(
        None,
        help="Visual tokens kept, the last one for the rest included: a count per image, or a share in (0, 1] of every "
        "crop. None: the image decides, or num_top. Not with plus, whose number depends on overlaps.",
    )
    plus: bool = setting(False, help="PruMerge+: patches at regular places of the flat order stay too.")
    num_top: int | float | None = setting(
        None,
        help="Instead of outliers: so many top patches of every crop, or a share in (0, 1) of them, rounded down (1/8 "
        "in the released code without adaptation).",
    )
    stride: int | None = setting(
        None,
        help="With plus: distance of the samples, >= 1. None: a third of the distance at which as many patches as "
        "there are outliers would lie.",
    )
    neighbours: int = setting(32, help="Patches folded into each kept one, >= 1 (fixed in the released code).")
    layer: int | None = setting(
        None,
        help="Vision layer whose queries and keys are read, 0-based. None: the last one, 23 in CLIP-L, as released.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = self.keep is not None or self.budget is not None
        share = isinstance(self.num_top, float) and 0 < self.num_top < 1
        count = isinstance(self.num_top, int) and not isinstance(self.num_top, bool) and self.num_top >= 1
        self._require(self.num_top is None or share or count, "num_top", "a count >= 1 or a share in (0, 1), or None")
        self._require(self.num_top is None or not fixed, "num_top", "None beside keep or budget")
        self._require(not (self.plus and fixed), "plus", "False beside keep or budget; give num_top and stride instead")
        self._require(self.stride is None or self.stride >= 1, "stride", ">= 1, or None")
        self._require(self.stride is None or self.plus, "stride", "None without plus")
        self._require(isinstance(self.neighbours, int) and self.neighbours >= 1, "neighbours", "an integer >= 1")

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(0, self.keep)]

    def probes(self, family: Any) -> list[Probe]:
        last = len(family.vision_layers) - 1
        attention = saliency_probe(self, family, self.layer, preferred=last, signal="vision_cls_wide")
        return [attention, Probe("vision_keys", attention.layer), *feature_probes(family)]

    def select(self, tokens: TokenGroup) -> Tensor:
        scores = tokens.probes[self.probes(tokens.family)[0].name]
        num_tokens = scores.shape[1]
        if self.num_top is not None:
            wanted = int(num_tokens * self.num_top) if isinstance(self.num_top, float) else self.num_top
            num_top = scores.new_full(scores.shape[:1], min(wanted, num_tokens), dtype=torch.long)
        elif self.keep is not None or self.budget is not None:
            num_top = scores.new_full(scores.shape[:1], tokens.num_keep - 1, dtype=torch.long)
            return prumerge_indices(scores, num_top)[:, : tokens.num_keep]
        else:
            num_top = num_outliers(scores)
        num_top = num_top.clamp(min=1)
        stride = None
        if self.plus:
            stride = torch.full_like(num_top, self.stride) if self.stride else sample_strides(num_tokens, num_top)
        index = prumerge_indices(scores, num_top, stride)
        # The engine needs the number on the host next in any case; merging fewer columns is worth asking for it now.
        return index[:, : int((index >= 0).sum(dim=1).max())]

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor:
        attention, keys, *_ = (tokens.probes[probe.name] for probe in self.probes(tokens.family))
        return embed(tokens, absorbed_features(features(tokens), keys, attention, index, self.neighbours))


def num_outliers(scores: Tensor) -> Tensor:
    """``[G]`` long: scores of ``[G, V]`` more than 1.5 times the interquartile range above the third quartile."""
    low, high = scores.quantile(scores.new_tensor([0.25, 0.75]), dim=1)
    num = (scores > (high + 1.5 * (high - low))[:, None]).sum(dim=1)
    # The released code goes through the ratio, whose binary fraction may cost one token.
    size = scores.shape[1]
    return torch.tensor([int(size * (count / size)) for count in range(size + 1)], device=num.device)[num]


def sample_strides(num_tokens: int, num_top: Tensor) -> Tensor:
    """Distance of PruMerge+'s samples, ``[G]`` long: a third of ``num_tokens / num_top``, rounded down twice."""
    steps = [int(1 / (max(count, 1) / num_tokens)) for count in range(num_tokens + 1)]
    return torch.tensor([max(1, int(step / 3)) for step in steps], device=num_top.device)[num_top]


def prumerge_indices(scores: Tensor, num_top: Tensor, stride: Tensor | None = None) -> Tensor:
    """
    Kept tokens, and a place for what leaves.

    Parameters
    ----------
    scores
        ``[G, V]``.
    num_top
        ``[G]`` long: how many of the largest stay.
    stride
        ``[G]`` long: distance of samples in the flat order, from 0 on and short of the last token; None: no samples.

    Returns
    -------
    Tensor
        ``[G, V]`` long: the top in descending order, then samples that are not among them in ascending order, then the
        best token that leaves, whose place the token for the rest takes; -1 fills up.
    """
    size = scores.shape[1]
    place, order = torch.arange(size, device=scores.device), scores.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    never = 3 * size
    turn = torch.where(rank < num_top[:, None], rank, never)
    if stride is not None:
        sampled = (place % stride[:, None] == 0) & (place < size - 1) & (turn == never)
        turn = torch.where(sampled, size + place, turn)
    # Something has to leave, or there is no place for it.
    last = (turn == turn.amax(dim=1, keepdim=True)) & (turn < never).all(dim=1, keepdim=True)
    turn = turn.masked_fill(last, never)
    best = rank.masked_fill(turn < never, size).argmin(dim=1, keepdim=True)
    turn, index = turn.scatter(1, best, 2 * size).sort(dim=1)
    return index.masked_fill(turn == never, -1)


def absorbed_features(features: Tensor, keys: Tensor, weights: Tensor, index: Tensor, num_neighbours: int) -> Tensor:
    """
    Kept features with their neighbours folded in, and the sum of those that leave.

    Parameters
    ----------
    features
        ``[G, V, C]``.
    keys
        ``[G, V, E]``: what neighbours are found by, with the cosine.
    weights
        ``[G, V]``: what a folded feature counts.
    index
        ``[G, K]`` long as `prumerge_indices` returns it.
    num_neighbours
        Of each kept token, among all others; the lower index wins a tie.

    Returns
    -------
    Tensor
        ``[G, K, C]``; the sum stands where the last entry of ``index`` is that is no filler.
    """
    num_columns, size = index.shape[1], features.shape[1]
    num_kept = (index >= 0).sum(dim=1, keepdim=True) - 1
    column = torch.arange(num_columns, device=index.device)
    kept = torch.where(column < num_kept, index, -1)
    own = kept.clamp(min=0)
    unit = F.normalize(keys, dim=-1)
    likeness = unit.gather(1, own[..., None].expand(-1, -1, unit.shape[-1])) @ unit.transpose(1, 2)
    likeness = likeness.scatter(2, own[..., None], -torch.inf)
    num_folded = min(num_neighbours, size - 1)
    # The set is all that counts: what lies above the least of the top, and the first of those level with it.
    least = likeness.topk(num_folded, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, level = likeness > least, likeness == least
    folded = above | (level & (level.cumsum(dim=-1) <= num_folded - above.sum(dim=-1, keepdim=True)))
    merged = features.gather(1, own[..., None].expand(-1, -1, features.shape[-1]))
    merged = merged + (weights[:, None] * folded) @ features
    # Fillers write into a column of their own that is cut off.
    leaves = torch.ones(len(index), size + 1, device=features.device)
    leaves = leaves.scatter(1, torch.where(kept < 0, size, kept), 0.0)[:, :size]
    rest = (weights * leaves)[:, None] @ features
    return torch.where((column == num_kept)[..., None], rest, merged)
