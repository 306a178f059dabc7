"""
HiPrune: objects from a middle vision layer, their neighbours, and the image's gist from a deep one.

Middle layers attend to objects, deep ones to a few patches that hold global information. Patches that receive most
attention in a middle layer (anchors) stay with their four neighbours (buffers); those that receive most in a deep layer
(registers) fill the budget.

Paper: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", arXiv
2508.00553. Code: github.com/Danielement321/HiPrune (MIT). Differs from the released code in that the budget is met
exactly (``exact_budget``), every image has its own attention and its own grid width, and anchors that alone exceed the
budget are cut off by rank. Neighbours are those of the released code: next in flat order, so that they wrap at the
grid's left and right border, and clamped to its first and last cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.selection import ascending_indices, ranks
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["HiPrune", "hierarchical_indices", "neighbours"]


@dataclass(frozen=True)
class HiPrune(CropwiseMethod):
    """
    Anchors, buffers and registers of every crop in raster order, before the decoder.

    Scores are the mean attention a patch receives from all queries, the class token's included; no class token is
    needed. Published: ``keep`` 192, 128, 64 on LLaVA-1.5; 640, 320, 160 per image on LLaVA-NeXT, packed without newline
    tokens and without unpadding, which this toolkit does not undo (cells that were unpadded away are neither candidates
    nor neighbours); 0.334, 0.223, 0.112 on Qwen2.5-VL, rounded to the nearest token.
    """

    id: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention, arXiv 2508.00553"
    code: ClassVar[str] = "https://github.com/Danielement321/HiPrune"

    alpha: float = setting(
        0.1,
        help="Share of the budget meant for anchors and buffers, in [0, 1]: a fifth of it, rounded half to even, are "
        "anchors. Neighbours that coincide leave more to the registers.",
    )
    object_layer: int | None = setting(
        None,
        help="Vision layer of the anchors, 0-based (the released option counts from 1). None: as published, 8 of "
        "CLIP-L's 24 layers and 15 of Qwen2.5-VL's 32; elsewhere the same share of the depth.",
    )
    layer: int | None = setting(
        None,
        help="Vision layer of the registers, 0-based. None: the layer whose output the projector takes (22 in CLIP-L, "
        "31 in Qwen2.5-VL, as published).",
    )
    exact_budget: bool = setting(
        True,
        help="False: as released, an image's budget is split over its crops without the remainder, and registers are "
        "kept off anchors and buffers by subtracting 1, which fails where attention is summed over queries (no class "
        "token): fewer tokens stay.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.alpha <= 1, "alpha", "in [0, 1]")

    def probes(self, family: Any) -> list[Probe]:
        depth = len(family.vision_layers)
        middle = depth // 3 if family.has_cls else (depth - 1) // 2
        objects = saliency_probe(
            self, family, self.object_layer, preferred=middle, name="object_layer", signal="vision_global"
        )
        return [objects, saliency_probe(self, family, self.layer, signal="vision_global")]

    def count(self, share: float, num_tokens: int) -> int:
        return max(1, round(num_tokens * share))

    def split(self, keep: int, sizes: Sequence[int]) -> list[int]:
        if self.exact_budget:
            return super().split(keep, sizes)
        return [min(keep // len(sizes), size) for size in sizes]

    def select(self, tokens: TokenGroup) -> Tensor:
        shallow, deep = (tokens.probes[probe.name] for probe in self.probes(tokens.family))
        if not self.exact_budget and not tokens.family.has_cls:
            # Sums over queries, as released: they average 1, whatever the number of patches.
            deep = deep / deep.mean(dim=1, keepdim=True)
        around = neighbours(tokens.row, tokens.col, tokens.grid).to(deep.device)
        num_anchors = round(tokens.num_keep * self.alpha / 5)
        return hierarchical_indices(shallow, deep, around, tokens.num_keep, num_anchors, exclude=self.exact_budget)


def neighbours(row: Tensor, col: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """
    Every token with those before and after it and in the rows above and below.

    Parameters
    ----------
    row, col
        ``[V]`` long: cells.
    grid
        Rows and columns of the full grid; None: nobody is known to have neighbours.

    Returns
    -------
    Tensor
        ``[V, 5]`` long, the token itself first; in place of a cell that no token shows stands the token again.
    """
    own = torch.arange(len(row))
    if grid is None:
        return own[:, None]
    height, width = grid
    flat = row * width + col
    at = torch.full((height * width,), -1).scatter(0, flat, own)
    beside = flat[:, None] + torch.tensor([0, -1, 1, -width, width])
    found = at[beside.clamp(0, height * width - 1)]
    return torch.where(found < 0, own[:, None], found)


def hierarchical_indices(
    shallow: Tensor, deep: Tensor, around: Tensor, num_keep: int, num_anchors: int, *, exclude: bool = True
) -> Tensor:
    """
    Anchors, buffers and registers.

    Parameters
    ----------
    shallow, deep
        ``[G, V]`` attention received in the middle and in the deep layer.
    around
        ``[V, n]`` long: a token and its neighbours.
    num_keep, num_anchors
        Tokens that stay, and anchors among them.
    exclude
        Registers are chosen from the other tokens; False: from all, after 1 was taken off anchors and buffers.

    Returns
    -------
    Tensor
        ``[G, num_keep]`` long, ascending; with ``exclude=False`` there may be fewer, and fillers of -1.
    """
    anchors = shallow.argsort(dim=-1, descending=True, stable=True)[:, :num_anchors]
    members = around[anchors].flatten(1)
    # When a token first comes up, anchor by anchor: the order in which those are cut off that exceed the budget.
    never = members.shape[1]
    turn = torch.full_like(shallow, never, dtype=torch.long)
    places = torch.arange(never, device=deep.device).expand_as(members)
    turn = turn.scatter_reduce(1, members, places, "amin")
    taken = (turn < never) & (ranks(-turn) < num_keep)
    deep = deep.masked_fill(taken, -torch.inf) if exclude else deep - taken.to(deep.dtype)
    registers = ranks(deep) < num_keep - taken.sum(dim=1, keepdim=True)
    return ascending_indices(taken | registers, num_keep)
