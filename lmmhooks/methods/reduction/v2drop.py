"""
V2Drop: drop the visual tokens that a layer barely changes.

Needs the states of two consecutive layers and no attention, so it has no preference for late positions.

Paper: "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models", CVPR 2026, arXiv 2509.01552.
Code: github.com/xuyang-liu16/V2Drop (Apache-2.0, implemented from its description). As released, the last cut leaves
one token, where the paper's text leaves none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import Cut, Positions, TokenGroup
from lmmhooks.methods.reduction.selection import top_ascending
from lmmhooks.methods.reduction.staging import StagedMethod

__all__ = ["V2Drop", "variation"]

Metric = Literal["l2", "l1", "cosine"]


def variation(before: Tensor, after: Tensor, metric: Metric) -> Tensor:
    """
    How much a layer changed tokens.

    Parameters
    ----------
    before, after
        ``[..., D]`` what entered the layer and what left it.
    metric
        Norm of the difference, or 1 minus the cosine of both.

    Returns
    -------
    Tensor
        ``[...]`` float32, at least 0 up to rounding.
    """
    before, after = before.float(), after.float()
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)
    return (after - before).norm(p=2 if metric == "l2" else 1, dim=-1)


@dataclass(frozen=True)
class V2Drop(StagedMethod):
    """
    Before every layer in ``layers``, keeps the tokens that changed most in the layer before.

    Shares are of the tokens a cut finds, rounded down, at least one token. All images of a prompt are ranked together.
    Published schedules for averages of 128 and 64 tokens are UNVERIFIED: use ``budget``, which leaves ``ratio`` of the
    tokens at every cut.
    """

    id: ClassVar[str] = "v2drop"
    paper: ClassVar[str] = "Variation-aware Vision Token Dropping, CVPR 2026, arXiv 2509.01552"
    code: ClassVar[str] = "https://github.com/xuyang-liu16/V2Drop"
    published_layers: ClassVar[tuple[int, ...]] = (3, 17, 22)

    positions: Positions = setting(
        "keep",
        help="'keep' leaves survivors their original positions, as released; 'repack' renumbers them; "
        "'auto' is 'keep'.",
    )
    ratios: tuple[float, ...] = setting(
        (0.5, 0.5, 0.0),
        help="Share of the tokens at hand kept by each cut, in [0, 1]; 0 keeps one token; ignored under a budget. "
        "Released: 0.5, 0.5, 0.",
    )
    metric: Metric = setting(
        "l2",
        help="Of the change: 'l2' as released; 'l1' and 'cosine' as the paper's ablation names them (formulas of the "
        "ablation UNVERIFIED).",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(map(float, self.ratios)))
        super().__post_init__()
        self._check_shares("ratios")
        self._require(self.metric in ("l2", "l1", "cosine"), "metric", "'l2', 'l1' or 'cosine'")

    @property
    def is_identity(self) -> bool:
        return super().is_identity if self.budget is not None else min(self.ratios) == 1

    def repacks(self, family: Any) -> bool:
        return self.positions == "repack"

    def cuts(self, family: Any) -> list[Cut]:
        stages = zip(self.stage_layers(family), self.ratios, strict=True)
        return [Cut(layer, ratio, of_current=True) for layer, ratio in stages if layer < family.num_layers]

    def probes(self, family: Any) -> list[Probe]:
        return [Probe("decoder_states", cut.layer - 1) for cut in self.cuts(family)]

    def count(self, share: float, num_tokens: int) -> int:
        return max(1, int(num_tokens * share))

    def select(self, tokens: TokenGroup) -> Tensor:
        before = tokens.probes[Probe("decoder_states", tokens.layer - 1).name]
        return top_ascending(variation(before, tokens.states, self.metric), tokens.num_keep)
