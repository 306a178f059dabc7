"""
ToMe: in every layer of the vision tower, merge the most similar pairs of tokens.

Tokens are split into two halves by position; each of the first finds its most similar partner in the second by cosine
of the attention keys, and the r best pairs are averaged, weighted by how many patches a token already contains. Later
attention knows the sizes: their logarithm is added to the logits ("proportional attention").

Paper: "Token Merging: Your ViT but Faster", ICLR 2023, arXiv 2210.09461. Code: github.com/facebookresearch/ToMe
(CC-BY-NC-4.0; written from its description). The release is for classifiers; what a multimodal model needs beyond it is
ours: layers behind the one that feeds the projector merge nothing, and a merged token enters the decoder at the place
of its first patch. How the figures that pruning papers report for "ToMe" were made is UNVERIFIED. Behind a tower that
attends in windows or joins patches itself, `tome-post` merges once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.tower import TowerMethod, TowerStep, TowerTokens, gather_tokens, patch_count

__all__ = ["ToMe", "constant_schedule", "even_schedule", "match_tokens", "merge_tokens"]


@dataclass(frozen=True)
class ToMe(TowerMethod):
    """
    Bipartite soft matching in vision layers 0 to `Family.feature_layer`; the class token never merges.

    Give ``keep`` for an exact number of tokens, reached by merging as evenly over the layers as halving allows, or
    ``r`` as released (ViT-L/16 at 384 pixels, which is CLIP-L/336's shape: 23). A layer merges at most half its tokens.
    """

    id: ClassVar[str] = "tome"
    paper: ClassVar[str] = "Token Merging: Your ViT but Faster, ICLR 2023, arXiv 2210.09461"
    code: ClassVar[str] = "https://github.com/facebookresearch/ToMe"

    r: int | Sequence[int | float] | None = setting(
        None,
        help="Instead of keep: pairs merged per layer; (r, inflection) with a float in [-1, 1], linear over the layers "
        "from r * (1 - inflection) on, mean r; or a list, one number per layer, zeros behind it.",
    )
    prop_attn: bool = setting(
        True, help="Add the logarithm of sizes to attention logits (released: on for models not trained with merging)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require((self.keep is None) != (self.r is None), "r", "given where keep is not, and only there")
        if self.r is None:
            return
        if isinstance(self.r, Sequence):
            object.__setattr__(self, "r", tuple(self.r))
        counts, inflection = self._parts()
        whole = all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in counts)
        self._require(
            bool(counts) and whole and -1 <= inflection <= 1,
            "r",
            "a number of pairs >= 0, (pairs, inflection) with a float in [-1, 1], or a list of numbers of pairs",
        )

    @property
    def is_identity(self) -> bool:
        return super().is_identity or (self.r is not None and not any(self._parts()[0]))

    def check(self, family: Any) -> None:
        super().check(family)
        num_layers = family.feature_layer + 1
        counts, _ = self._parts()
        self._require(len(counts) <= num_layers, "r", f"a list of at most {num_layers} numbers on {family.name}")
        if (num_patches := patch_count(family)) is not None:
            self.schedule(num_patches, num_layers)

    def tower_layers(self, family: Any) -> Sequence[int]:
        return range(family.feature_layer + 1)

    def schedule(self, num_patches: int, num_layers: int) -> list[int]:
        """Pairs to merge in every layer."""
        if self.keep is not None:
            left = self.target(num_patches)
            merged = even_schedule(num_patches, num_patches - left, num_layers)
            if merged is None:
                least = num_patches - sum(_capped(num_patches, num_patches, num_layers))
                raise MethodError(
                    f"{self.id}: keep={self.keep} means {left} of {num_patches} patches, but {num_layers} layers that "
                    f"merge at most half of their tokens leave {least}; give at least that"
                )
            return merged
        counts, inflection = self._parts()
        if isinstance(self.r, tuple) and not isinstance(self.r[-1], float):
            return [*counts, *[0] * (num_layers - len(counts))]
        return constant_schedule(counts[0], inflection, num_layers)

    def reduce(self, tokens: TowerTokens) -> TowerStep | None:
        memory = tokens.memory
        if "schedule" not in memory:
            last = tokens.family.feature_layer
            memory["schedule"] = self.schedule(tokens.num_patches, last + 1)
            memory["size"] = torch.ones_like(tokens.origin, dtype=torch.float32)
        r = min(memory["schedule"][tokens.layer], (tokens.states.shape[1] - tokens.first) // 2)
        if r <= 0:
            return None
        source, partner, rest = match_tokens(tokens.key.mean(dim=1), r, bool(tokens.first))
        states, size, origin = merge_tokens(tokens.states, memory["size"], tokens.origin, source, partner, rest)
        memory["size"] = size
        return TowerStep(states, origin, weight=size if self.prop_attn else None)

    def _parts(self) -> tuple[tuple[Any, ...], float]:
        """Counts of ``r`` and its inflection."""
        if not isinstance(self.r, tuple):
            return ((self.r,) if self.r is not None else ()), 0.0
        if len(self.r) == 2 and isinstance(self.r[1], float):
            return self.r[:1], self.r[1]
        return self.r, 0.0


def match_tokens(metric: Tensor, r: int, has_cls: bool) -> tuple[Tensor, Tensor, Tensor]:
    """
    Bipartite soft matching between even and odd positions.

    Parameters
    ----------
    metric
        ``[G, t, d]``: what tokens are compared by.
    r
        Pairs, at most half of the tokens without the class token.
    has_cls
        Position 0 is a class token, which is no source.

    Returns
    -------
    tuple
        Long ``[G, r]``: ranks among the even positions of the sources, most similar first; long ``[G, r]``: ranks among
        the odd positions of their partners; long ``[G, even - r]``: ranks of the even positions that are no sources,
        ascending where there is a class token, else by falling similarity, as released.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if has_cls:
        similarity[:, 0] = -torch.inf
    best, partner = similarity.max(dim=-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    source, rest = order[:, :r], order[:, r:]
    return source, partner.gather(1, source), rest.sort(dim=1).values if has_cls else rest


def merge_tokens(
    states: Tensor, size: Tensor, origin: Tensor, source: Tensor, partner: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Average sources into their partners, weighted by size.

    Parameters
    ----------
    states, size, origin
        ``[G, t, C]``, ``[G, t]`` float and ``[G, t]`` long: of every token.
    source, partner, rest
        As `match_tokens` returns them.

    Returns
    -------
    tuple
        States, sizes and smallest origins of the tokens that are left, ``t - r`` of them: even positions that are no
        sources, then all odd ones.
    """
    even, odd = states[:, ::2], states[:, 1::2]
    even_size, odd_size = size[:, ::2], size[:, 1::2]
    given = even_size.gather(1, source)
    total = odd_size.scatter_add(1, partner, given)
    weighted = gather_tokens(even, source) * given[..., None].to(states.dtype)
    places = partner[..., None].expand_as(weighted)
    merged = (odd * odd_size[..., None].to(states.dtype)).scatter_add(1, places, weighted)
    merged = merged / total[..., None].to(states.dtype)
    first = origin[:, 1::2].scatter_reduce(1, partner, origin[:, ::2].gather(1, source), "amin")
    return (
        torch.cat([gather_tokens(even, rest), merged], dim=1),
        torch.cat([even_size.gather(1, rest), total], dim=1),
        torch.cat([origin[:, ::2].gather(1, rest), first], dim=1),
    )


def constant_schedule(r: int, inflection: float, num_layers: int) -> list[int]:
    """Pairs per layer, linear from ``r * (1 - inflection)`` with mean r, rounded down as released."""
    low = int(r * (1.0 - inflection))
    step = (2 * r - 2 * low) / (num_layers - 1) if num_layers > 1 else 0.0
    return [int(low + step * layer) for layer in range(num_layers)]


def even_schedule(num_patches: int, num_merged: int, num_layers: int) -> list[int] | None:
    """
    Pairs per layer that come to ``num_merged``, as even as possible, more in earlier layers where it does not divide.

    None where halving the patches in every layer merges fewer.
    """
    for most in range(-(-num_merged // num_layers), num_patches // 2 + 1):
        schedule = _capped(num_patches, most, num_layers)
        if (surplus := sum(schedule) - num_merged) >= 0:
            # One less in the last layers that do the most; with one less in all of them it would not have been enough.
            full = schedule.count(most)
            return [r - (full - surplus <= layer < full) for layer, r in enumerate(schedule)]
    return None


def _capped(num_patches: int, most: int, num_layers: int) -> list[int]:
    """Pairs per layer that merge up to ``most``, and no more than half of what is left; never rising."""
    schedule = []
    for _ in range(num_layers):
        schedule.append(min(most, num_patches // 2))
        num_patches -= schedule[-1]
    return schedule
