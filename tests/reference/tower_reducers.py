"""
Reducers that score in the vision tower, the slow way: full attention matrices, lists, one token at a time.

Readings are taken from queries and keys of a plain model; every rule gets the tokens of one crop (or image) and says
who stays, in which order, and with what feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

#: Local index of the token that stays, and its new feature; None for its own.
Kept = tuple[int, "Tensor | None"]


# -- rules ------------------------------------------------------------------------------------------------------------


def top(scores: Sequence[float], num: int) -> list[int]:
    """Indices of the largest, best first; the lower index wins a tie."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:num]


def vtc_cls(layers: Sequence[Sequence[float]], num_keep: int) -> list[int]:
    """``layers``: class attention per layer of the ensemble."""
    summed = [sum(scores[i] for scores in layers) for i in range(len(layers[0]))]
    return sorted(top(summed, num_keep))


def hiprune(
    shallow: Sequence[float],
    deep: Sequence[float],
    cells: Sequence[int],
    grid: tuple[int, int],
    num_keep: int,
    alpha: float,
    exact: bool = True,
) -> list[int]:
    """``cells``: place of every token in the flat order of the full grid."""
    height, width = grid
    members: list[int] = []
    for anchor in top(shallow, round(num_keep * alpha / 5)):
        cell = cells[anchor]
        for other in (cell, cell - 1, cell + 1, cell - width, cell + width):
            other = min(max(other, 0), height * width - 1)
            if other in cells and cells.index(other) not in members:
                members.append(cells.index(other))
    members = members[:num_keep]
    rest = [-math.inf if exact and i in members else deep[i] - (i in members) for i in range(len(deep))]
    return sorted({*members, *top(rest, num_keep - len(members))})


def hired(
    early: Sequence[float],
    late: Sequence[Sequence[float]],
    total: int,
    alpha: float,
    regions: Sequence[int],
    exact: bool = False,
) -> list[list[int]]:
    """Kept of the thumbnail and of every tile; ``late`` begins with the thumbnail, ``regions`` is a tile per token."""
    sizes = [len(scores) for scores in late]
    full = min(int(total * alpha), sizes[0])
    rest = min(total - full, sum(sizes[1:]))
    if exact:
        full = total - rest
    content = top(early, int(sizes[0] * (1 - alpha)))
    weights = [sum(regions[i] == tile for i in content) for tile in range(len(sizes) - 1)]
    shares = [float(torch.tensor(w) / torch.tensor(max(1, sum(weights))) * rest) for w in weights]
    budgets = [min(int(share), size) for share, size in zip(shares, sizes[1:], strict=True)]
    if exact:
        order = top([share - math.floor(share) for share in shares], len(shares))
        for tile in order:
            if sum(budgets) < rest and budgets[tile] < sizes[tile + 1]:
                budgets[tile] += 1
        for tile in order:
            while sum(budgets) < rest and budgets[tile] < sizes[tile + 1]:
                budgets[tile] += 1
    return [sorted(top(scores, num)) for scores, num in zip(late, [full, *budgets], strict=True)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a / a.norm()) @ (b / b.norm()))


def visionzip(
    attention: Sequence[float],
    keys: Tensor,
    features: Tensor,
    cls: Tensor | None,
    num_dominant: int,
    num_contextual: int,
    average: bool = False,
) -> list[Kept]:
    """``keys [V, H, d]``, ``features [V, C]``; ``num_dominant`` counts the class token, which is first if given."""
    size = len(attention)
    metric = [sum(keys[i, head] for head in range(keys.shape[1])) / keys.shape[1] for i in range(size)]
    dominant = sorted(top(attention, num_dominant - (cls is not None)))
    rest = [i for i in range(size) if i not in dominant]
    targets: list[int] = []
    if num_contextual:
        step = max(1, len(rest) // num_contextual)
        targets = rest[::step][:num_contextual]
    merged: dict[int, list[Tensor]] = {target: [] for target in targets}
    for i in rest:
        if targets and i not in targets:
            merged[max(targets, key=lambda target: cosine(metric[i], metric[target]))].append(features[i])
    kept: list[Kept] = [(i, None) for i in dominant]
    for target, others in merged.items():
        mean = sum(others, torch.zeros(features.shape[1])) / max(1, len(others))
        whole = sum(others, features[target]) / (1 + len(others))
        kept.append((target, whole if average else features[target] + mean))
    if cls is not None:
        kept.insert(0, (next(i for i in rest if i not in targets), cls))
    return kept


def outliers(attention: Sequence[float]) -> int:
    """Scores above the third quartile by more than 1.5 times the interquartile range."""
    ordered = sorted(attention)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    limit = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
    return sum(score > limit for score in attention)


def prumerge(
    attention: Sequence[float],
    keys: Tensor,
    features: Tensor,
    num_top: int | None = None,
    plus: bool = False,
    stride: int | None = None,
    num_neighbours: int = 32,
) -> list[Kept]:
    """``keys [V, E]``, ``features [V, C]``."""
    size = len(attention)
    count = int(size * (outliers(attention) / size)) if num_top is None else num_top
    count = max(1, count) if plus or num_top is None else count
    kept = top(attention, count)
    if plus:
        if stride is None:
            stride = max(1, int(int(1 / (count / size)) / 3))
        kept += [t for t in range(0, size - 1, stride) if t not in kept]
    if len(kept) == size:
        kept.pop()
    left = [i for i in range(size) if i not in kept]
    out: list[Kept] = []
    for place, i in enumerate(kept):
        others = kept[:place] + kept[place + 1 :] + left
        others = sorted(others, key=lambda j: -cosine(keys[i], keys[j]))[:num_neighbours]
        out.append((i, features[i] + sum(attention[j] * features[j] for j in others)))
    best = max(left, key=lambda j: attention[j])
    return [*out, (best, sum(attention[j] * features[j] for j in left))]


def vispruner(
    attention: Sequence[float], features: Tensor, num_keep: int, important_ratio: float, step: int = 8
) -> list[int]:
    order = top(attention, len(attention))
    num_important = int(num_keep * important_ratio)
    num_diverse = num_keep - num_important
    important, rest = order[:num_important], order[num_important:]
    while num_diverse and len(rest) > num_diverse:
        num_leaving = min(step, len(rest) // 2, len(rest) - num_diverse)
        even, odd = rest[::2], rest[1::2]
        closest = [max(cosine(features[i], features[j]) for j in odd) for i in even]
        by_likeness = [even[place] for place in top(closest, len(even))]
        rest = by_likeness[num_leaving:] + odd
    return sorted(important + (rest if num_diverse else []))


# -- readings ---------------------------------------------------------------------------------------------------------


@dataclass
class Tower:
    """Queries and keys ``[crops, H, n, d]`` of every attention call and the output of every vision layer."""

    calls: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def watched_tower(family: Any) -> Iterator[Tower]:
    """Run the vision tower with full attention matrices and note what goes in and out."""
    tower = Tower()
    modules = {family.attention_of(layer): number for number, layer in enumerate(family.vision_layers)}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        tower.calls.setdefault(modules[module], []).append((q, k))
        weights = torch.softmax((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).float(), dim=-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    def note(number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tower.states[number] = output[0] if isinstance(output, tuple) else output

        return hook

    AttentionInterface.register("test_watched_tower", attend)
    AttentionMaskInterface.register("test_watched_tower", eager_mask)
    configs = {id(module.config): module.config for module in modules}.values()
    before = {id(config): config._attn_implementation for config in configs}
    hooks = [layer.register_forward_hook(note(number)) for number, layer in enumerate(family.vision_layers)]
    for config in configs:
        config._attn_implementation_internal = "test_watched_tower"
    try:
        yield tower
    finally:
        for hook in hooks:
            hook.remove()
        for config in configs:
            config._attn_implementation_internal = before[id(config)]


@dataclass
class Crop:
    """
    One crop as the tower saw it, and the visual tokens that show it.

    ``q`` and ``k`` are ``[H, n, d]`` by layer with the class token if there is one; ``patches`` lists the patches of
    every token; ``numbers`` are the tokens among those of the row without padding.
    """

    q: dict[int, Tensor]
    k: dict[int, Tensor]
    output: dict[int, Tensor]
    patches: list[list[int]]
    numbers: list[int]
    cells: list[int]
    grid: tuple[int, int]
    has_cls: bool
    states: Tensor | None = None
    """``[V, D]`` of the tokens, once they enter the decoder."""

    def _tokens(self, per_patch: Tensor) -> Tensor:
        return torch.stack([per_patch[patches].mean(dim=0) for patches in self.patches])

    def weights(self, layer: int) -> Tensor:
        """``[H, n, n]``."""
        q, k = self.q[layer], self.k[layer]
        return torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)

    def salient(self, layer: int) -> list[float]:
        """Class attention, or attention received."""
        weights = self.weights(layer).mean(dim=0)
        return self._tokens(weights[0, 1:] if self.has_cls else weights.mean(dim=0)).tolist()

    def received(self, layer: int) -> list[float]:
        """Mean over all queries."""
        return self._tokens(self.weights(layer).mean(dim=(0, 1))[int(self.has_cls) :]).tolist()

    def wide(self, layer: int) -> list[float]:
        """Class attention of a single head; attention received where there is no class token."""
        if not self.has_cls:
            return self.received(layer)
        q, k = (x[layer].transpose(0, 1).flatten(1) for x in (self.q, self.k))
        return self._tokens(torch.softmax(q[0] @ k.T / q.shape[1] ** 0.5, dim=-1)[1:]).tolist()

    def keys(self, layer: int) -> Tensor:
        """``[V, H, d]``."""
        return self._tokens(self.k[layer].transpose(0, 1)[int(self.has_cls) :])

    def features(self, layer: int) -> Tensor:
        """``[V, C]``."""
        return self._tokens(self.output[layer][int(self.has_cls) :])
