"""
FitPrune: delete in every layer as many visual tokens as a fitted recipe says, those that receive the least attention.

The recipe keeps the attention that visual tokens receive, from each other and from text, almost as it was, under a
budget of FLOPs; it is fitted once on a few samples.

Paper: "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI 2025,
arXiv 2409.10197. Code: github.com/ywh187/FitPrune (implemented from its description). There a deleted token also skips
the output projection and feed-forward part of its last layer; that saves time and changes no other token, and is left
out here. Released recipes are for LLaVA-1.5-7B; other depths, token counts and reductions are interpolated (extension).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.layout import Layout
from lmmhooks.methods.base import names_record, setting
from lmmhooks.methods.probe import Probe, RowsRead
from lmmhooks.methods.reduction.base import Cut, Newline, Positions, ReductionMethod, Scope, TokenGroup
from lmmhooks.methods.reduction.recipes import PUBLISHED, Recipes, kept_curve

__all__ = ["FitPrune", "received_by_side"]


def received_by_side(weights: Tensor, rows: Tensor, members: Tensor, layout: Layout) -> Tensor:
    """
    Attention a key receives, maximum over heads: mean over visual rows, and sum over text rows behind the first image.

    Parameters
    ----------
    weights
        ``[B, H, R, N]`` of some rows.
    rows, members
        ``[B, R]``: where they stand, and which of them count.
    layout
        Of the N keys.

    Returns
    -------
    Tensor
        ``[B, 2, N]``; blocks of rows add up.
    """
    strongest = weights.amax(dim=1)
    visual, text = (mask.gather(1, rows) & members for mask in (layout.visual, layout.after_image))
    number = layout.visual.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.stack([visual / number, text.to(strongest.dtype)], dim=1) @ strongest


def _read(read: RowsRead) -> Tensor:
    return received_by_side(read.weights, read.rows, read.members, read.layout)


@dataclass(frozen=True)
class FitPrune(ReductionMethod):
    """
    After every layer, the tokens with the smallest product of both kinds of received attention go.

    Reads all rows of every layer that deletes: the head maximum has no cheaper exact form. ``budget`` picks the recipe
    between the fitted ones. All images of a prompt are one span.
    """

    id: ClassVar[str] = "fitprune"
    paper: ClassVar[str] = "Fit and Prune, AAAI 2025, arXiv 2409.10197"
    code: ClassVar[str] = "https://github.com/ywh187/FitPrune"
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {"recipe": "command"}

    keep: None = field(default=None, init=False)
    positions: Positions = setting(
        "keep",
        help="'keep' leaves survivors their original positions, as released; 'repack' renumbers them; "
        "'auto' is 'keep'.",
    )
    newline: Newline = setting(
        "rank", help="Newline tokens: 'rank' them like visual ones; or 'drop', 'keep_per_row', 'per_kept_row'."
    )
    reduction: float = setting(
        0.6,
        help="Share of the visual FLOPs that the recipe removes, in [0, 1); released for 0.1 to 0.9, between which "
        "recipes are interpolated; 0 does nothing. Ignored under a budget. Paper: 0.6.",
    )
    recipe: Any = setting(
        "llava-1.5-7b",
        help="Deletions per layer: 'llava-1.5-7b', the released ones; None: those that `lmmhooks calibrate fitprune` "
        "found for this checkpoint; a path ending in .json: such a record; or a mapping of reductions to lists with "
        "the share of the original visual tokens that each decoder layer deletes.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.reduction < 1, "reduction", "in [0, 1)")
        if self.recipe is None or names_record(self.recipe):
            return
        if isinstance(self.recipe, str):
            known = ", ".join(map(repr, PUBLISHED))
            self._require(self.recipe in PUBLISHED, "recipe", f"{known}, a path that ends in .json, a mapping or None")
        else:
            object.__setattr__(self, "recipe", self._given())

    def _given(self) -> Recipes:
        pairs = self.recipe.items() if isinstance(self.recipe, Mapping) else self.recipe
        try:
            found = sorted((float(target), tuple(map(float, shares))) for target, shares in pairs)
        except (TypeError, ValueError):
            found = []
        valid = len({len(shares) for _, shares in found}) == 1 and len({target for target, _ in found}) == len(found)
        for target, shares in found:
            valid = valid and 0 < target < 1 and bool(shares) and min(shares) >= 0 and sum(shares) <= 1 + 1e-6
        self._require(
            valid,
            "recipe",
            "a mapping of reductions in (0, 1) to lists, one share per layer, that sum to at most 1, such as "
            "{0.5: [0.25, 0.25, 0.0, 0.0]}",
        )
        return tuple(found)

    @property
    def is_identity(self) -> bool:
        return super().is_identity if self.budget is not None else self.reduction == 0

    @property
    def scope(self) -> Scope:
        return "sample"

    def repacks(self, family: Any) -> bool:
        return self.positions == "repack"

    def _curve(self, reduction: float, family: Any) -> list[float]:
        recipes = self.recipe if isinstance(self.recipe, tuple) else PUBLISHED.get(self.recipe or "")
        # A record that has not been read yet: any curve will do for what is checked before.
        return kept_curve(recipes or PUBLISHED["llava-1.5-7b"], reduction, family.num_layers)

    def cuts(self, family: Any) -> list[Cut]:
        before, cuts = 1.0, []
        for layer, share in enumerate(self._curve(self.reduction, family)[:-1]):
            # What the last layer deletes no layer sees; under a budget any layer may turn out to delete.
            if share < before or self.budget is not None:
                cuts.append(Cut(layer + 1, share))
            before = share
        return cuts

    def shares(self, ratio: float, family: Any) -> dict[int, float]:
        return {layer + 1: share for layer, share in enumerate(self._curve(1 - ratio, family)[:-1])}

    def probes(self, family: Any) -> list[Probe]:
        return [self._probe(cut.layer) for cut in self.cuts(family)]

    def _probe(self, layer: int) -> Probe:
        return Probe("decoder_rows", layer - 1, "all", reduce=_read, label="by side")

    def count(self, share: float, num_tokens: int) -> int:
        # Deletions are rounded down; a share of 1 - 62 / 576 must not lose a 63rd token to binary fractions.
        return num_tokens - int((1 - share) * num_tokens + 1e-6)

    def select(self, tokens: TokenGroup) -> Tensor:
        received, cross = tokens.probes[self._probe(tokens.layer).name].unbind(dim=-1)
        order = (received * cross).sort(dim=1, stable=True).indices
        return order[:, order.shape[1] - tokens.num_keep :].sort(dim=1).values
