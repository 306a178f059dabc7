"""
VisPruner: keep what the class token attends to, and of the rest what resembles the others least.

Part of the budget goes to the most attended patches; near duplicates are then taken out of the rest, a few at a time,
until the budget is met.

Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025, arXiv
2412.01818 v2. Code: github.com/Theia-4869/VisPruner (Apache-2.0). Differs from the released code where that stops with
an error (an odd number of tokens to choose from, fewer than ``step`` pairs left): of R tokens, of which T are to stay,
``min(step, R // 2, R - T)`` leave per pass, and the even places are the longer half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import CropwiseMethod, TokenGroup
from lmmhooks.methods.reduction.merging import feature_probes, features
from lmmhooks.methods.vision_scores import saliency_probe

__all__ = ["VisPruner", "distinct_indices"]


@dataclass(frozen=True)
class VisPruner(CropwiseMethod):
    """
    Attended and mutually distinct tokens of every crop in raster order, before the decoder.

    Published with ``keep`` 128, 64 and 32 on LLaVA-1.5, and as many per crop (``keep_per='crop'``) on LLaVA-NeXT,
    packed without newline tokens and without unpadding, which this toolkit does not undo: crops that the model unpadded
    have fewer candidates. ``important_ratio=1`` is `fastervlm`.

    Towers without a class token are scored by the attention a patch receives, as the authors advise. Features are those
    the projector takes; where several patches make a token (Qwen, InternVL, OneVision), the token's own state.
    """

    id: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "Beyond Text-Visual Attention, ICCV 2025, arXiv 2412.01818 v2"
    code: ClassVar[str] = "https://github.com/Theia-4869/VisPruner"

    important_ratio: float = setting(
        0.5, help="Share of the budget given to attention, in [0, 1], rounded down (paper: 0.5; 0.75 for MME at 64)."
    )
    step: int = setting(8, help="Near duplicates taken out per pass, >= 1 (fixed in the released code).")
    layer: int | None = setting(
        None,
        help="Vision layer whose attention is read, 0-based. None: the layer whose output the projector takes (22 in "
        "CLIP-L, as published), or the nearest one that sees the whole crop where there is no class token.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.important_ratio <= 1, "important_ratio", "in [0, 1]")
        self._require(isinstance(self.step, int) and self.step >= 1, "step", "an integer >= 1")

    def probes(self, family: Any) -> list[Probe]:
        return [saliency_probe(self, family, self.layer), *feature_probes(family)]

    def select(self, tokens: TokenGroup) -> Tensor:
        attention = tokens.probes[self.probes(tokens.family)[0].name]
        num_important = int(tokens.num_keep * self.important_ratio)
        order = attention.argsort(dim=-1, descending=True, stable=True)
        important, rest = order[:, :num_important], order[:, num_important:]
        distinct = distinct_indices(features(tokens), rest, tokens.num_keep - num_important, self.step)
        return torch.cat([important, distinct], dim=1).sort(dim=1).values


def distinct_indices(features: Tensor, candidates: Tensor, num_keep: int, step: int = 8) -> Tensor:
    """
    Thin out candidates pair by pair.

    In every pass the candidates at even places are compared with those at odd places by cosine; the ``step`` even ones
    that come closest to some odd one leave, the others go to the front in the order of that likeness.

    Parameters
    ----------
    features
        ``[G, V, C]``.
    candidates
        ``[G, R]`` long into them; their order decides who is compared with whom.
    num_keep
        How many of them stay, at most R.
    step
        How many leave per pass.

    Returns
    -------
    Tensor
        ``[G, num_keep]`` long, in the order of the last pass.
    """
    if num_keep == 0:
        return candidates[:, :0]
    unit = F.normalize(features, dim=-1)
    num_groups, size = features.shape[:2]
    likeness = (unit @ unit.transpose(1, 2)).flatten(0, 1)
    first = torch.arange(num_groups, device=features.device)[:, None] * size
    while (num_left := candidates.shape[1]) > num_keep:
        num_leaving = min(step, num_left // 2, num_left - num_keep)
        even, odd = candidates[:, ::2], candidates[:, 1::2]
        # Rows first, then columns of what then lies together: several times faster than picking single entries.
        rows = likeness.index_select(0, (even + first).flatten()).view(num_groups, -1, size)
        closest = rows.gather(2, odd[:, None].expand(-1, rows.shape[1], -1)).amax(dim=-1)
        order = closest.argsort(dim=-1, descending=True, stable=True)[:, num_leaving:]
        candidates = torch.cat([even.gather(1, order), odd], dim=1)
    return candidates
