"""
FastV: after the first decoder layers, keep the visual tokens that the last prompt token attends to.

Paper: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
Models", ECCV 2024, arXiv 2403.06764. Code: github.com/pkunlp-icler/FastV (implemented from its description).
Differs from the paper's text, which averages over all rows: every released variant reads the last row (``rows``).
Differs from the released mask variant in that the set is chosen once, not again at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import Cut, Newline, Positions, ReductionMethod, Scope, TokenGroup
from lmmhooks.methods.reduction.selection import top_ascending

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(ReductionMethod):
    """
    One cut before decoder layer ``layer``, ranked by head-mean attention in the layer before.

    ``keep`` is what stays, ``1 - R`` in the paper; a share is rounded to the nearest token, halves to even. All images
    of a prompt are ranked together, as is the one span of the released code; an integer ``keep`` counts per image, so
    two images share twice as many. Newline tokens are ranked like any other. Before the
    layer past the last, nothing happens.
    """

    id: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, arXiv 2403.06764"
    code: ClassVar[str] = "https://github.com/pkunlp-icler/FastV"
    cut_settings: ClassVar[tuple[str, ...]] = ("layer",)

    keep: int | float | None = setting(
        0.5,
        help="Visual tokens kept from the cut on: a count per image, or a share in (0, 1]; "
        "paper: 0.75, 0.5, 0.25, 0.125.",
    )
    positions: Positions = setting(
        "keep",
        help="'keep' leaves survivors their original positions, as released; 'repack' renumbers them; "
        "'auto' is 'keep'.",
    )
    newline: Newline = setting(
        "rank", help="Newline tokens: 'rank' them as released; or 'drop', 'keep_per_row', 'per_kept_row'."
    )
    layer: int = setting(2, help="First decoder layer that sees the reduced set, >= 1 (paper: 2; demo: 3).")
    rows: Literal["last", "after_image", "all"] = setting(
        "last",
        help="Prompt rows whose attention is averaged: 'last' as released, text 'after_image', or 'all' as the "
        "paper's text says.",
    )
    per_image: bool = setting(False, help="Rank every image on its own, so that each keeps its share.")
    mode: Literal["prune", "mask"] = setting(
        "prune",
        help="'mask' hides the dropped keys instead of removing the tokens: same answer, no savings; for ablations.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.keep is not None, "keep", "a token count or a share in (0, 1]")
        self._require(self.layer >= 1, "layer", ">= 1: the layer before it is the one that ranks")
        self._require(self.rows in ("last", "after_image", "all"), "rows", "'last', 'after_image' or 'all'")
        self._require(self.mode in ("prune", "mask"), "mode", "'prune' or 'mask'")

    @property
    def scope(self) -> Scope:
        return "image" if self.per_image else "sample"

    def repacks(self, family: Any) -> bool:
        return self.positions == "repack"

    def cuts(self, family: Any) -> list[Cut]:
        return [Cut(self.layer, self.keep, hide=self.mode == "mask")] if self.layer < family.num_layers else []

    def probes(self, family: Any) -> list[Probe]:
        return [Probe("decoder_rows", self.layer - 1, self.rows)] if self.layer < family.num_layers else []

    def count(self, share: float, num_tokens: int) -> int:
        return round(num_tokens * share)

    def select(self, tokens: TokenGroup) -> Tensor:
        (scores,) = tokens.probes.values()
        return top_ascending(scores, tokens.num_keep)
