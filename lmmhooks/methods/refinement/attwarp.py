"""
AttWarp: widen the columns and heighten the rows that attention is on, and ask again about the warped picture.

Nothing is removed, straight lines along the axes stay straight, and no visual token is added. The map and the mask made
of it are those of attention prompting with twice the contrast; the mask at the size of the image is what columns and
rows are scaled by.

Follows the released code, which reads one layer and renormalises per head, where the paper averages layers. It brings
every image to 500 x 500 pixels (``size=(500, 500)``, preset ``released``); here the image keeps its size. ``chain``
repeats looking and warping until the attention stays as it is; it is in the paper but not in the release, and neither
its threshold nor its longest run is known (both UNVERIFIED). Warps are composed, and the image is sampled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.answering import Ask
from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.operators import warped
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.refinement.softmask import AnswerMap
from lmmhooks.methods.refinement.warping import MONOTONE, backwards, capped, densities, knots

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AttWarp", "divergence", "positions"]

Edges = tuple[np.ndarray, np.ndarray]
"""Knots of a warp, across and down."""


def positions(warps: Sequence[Edges]) -> tuple[np.ndarray, np.ndarray]:
    """
    Where a picture is sampled to be warped several times.

    Parameters
    ----------
    warps
        Knots across and down, first warp first; each belongs to the picture that the one before leaves.

    Returns
    -------
    tuple
        Columns and rows of the first picture, one per column and row of the last.
    """
    axes = []
    for axis in (0, 1):
        places = np.arange(int(warps[-1][axis][-1]), dtype=np.float64)
        for edges in reversed(warps):
            places = backwards(places, edges[axis])
        axes.append(places)
    return axes[0], axes[1]


def divergence(now: Tensor, before: Tensor) -> float:
    """Kullback-Leibler divergence of one map from another, both ``[n]`` of any mass, in nats."""
    p, q = now / now.sum(), before / before.sum()
    # Where there is no mass now there is nothing to add.
    return float(torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum())


@dataclass(frozen=True)
class AttWarp(AnswerMap):
    """Give more room to what an answer attends to."""

    id: ClassVar[str] = "attwarp"
    paper: ClassVar[str] = (
        "Constructive Distortion: Improving MLLMs with Attention-Guided Image Warping, ICLR 2026, arXiv:2510.09741"
    )
    code: ClassVar[str] = "https://github.com/dwipddalal/AttWarp"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"released": {"size": (500, 500)}, "chain": {"chain": 5}}

    contrast: float = setting(10.0, help="Factor before the sigmoid that raises the contrast of the map, above 0.")
    transform: str = setting(
        "identity",
        help="Function of the mask before the sums: 'identity' (released runs), 'sqrt', 'square' or 'exp'.",
    )
    invert: bool = setting(False, help="Apply the inverse of `transform` to the sums over columns and rows.")
    size: tuple[int, int] | None = setting(None, help="Width and height of the warped picture; unset: the image's own.")
    max_magnification: float | None = setting(
        None, help="Widest a column (highest a row) may become, in multiples of its size, 1 or more; unset: any."
    )
    chain: int = setting(1, help="Warps in a row at most, 1 or more; 1: AttWarp, more: its chain (UNVERIFIED).")
    epsilon: float = setting(
        0.01, help="Divergence of a map from the one before, in nats, below which a chain ends, 0 or more (UNVERIFIED)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.transform in MONOTONE, "transform", " or ".join(map(repr, MONOTONE)))
        if self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))
            self._require(len(self.size) == 2 and min(self.size) >= 1, "size", "width and height, 1 or more, or unset")
        capped_at = self.max_magnification
        self._require(capped_at is None or capped_at >= 1, "max_magnification", "1 or more, or unset")
        self._require(self.chain >= 1, "chain", "1 or more")
        self._require(self.epsilon >= 0, "epsilon", "0 or more")

    @property
    def is_identity(self) -> bool:
        return self.max_magnification == 1 and self.size is None and self.show == "refined"

    def edges(self, saliency: Saliency) -> Edges:
        """Knots of the warp that a map asks for."""
        sums = densities(np.asarray(self.mask(saliency)), self.transform, self.invert)
        lengths = self.size or saliency.size
        across, down = (knots(capped(d, self.max_magnification), n) for d, n in zip(sums, lengths, strict=True))
        return across, down

    def refined(self, image: Image, saliency: Saliency) -> Image:
        return warped(image, *positions([self.edges(saliency)]))

    def answer(self, ask: Ask, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        if self.chain == 1:
            return super().answer(ask, image, prompt, **generate_kwargs)
        look: Look = ask  # type: ignore[assignment] # what the engine gives to methods of this kind
        warps = self.warps(look)
        if not warps:
            return look.tell(prompt, **generate_kwargs).text
        picture = warped(look.image, *positions(warps))
        return look.tell(self.question(prompt), self.shown(look.image, picture), **generate_kwargs).text

    def warps(self, look: Look) -> list[Edges]:
        """Of a chain, one after the other; none where the first map says nothing."""
        warps: list[Edges] = []
        before, there = None, look
        while len(warps) < self.chain:
            found = self.saliency(there)
            settled = (
                before is not None
                # Another number of cells is another picture of the image; nothing can be said then.
                and len(found.values) == len(before)
                and divergence(found.values, before) < self.epsilon
            )
            if settled or found.spread <= self.min_spread:
                break
            warps.append(self.edges(found))
            before = found.values
            if len(warps) < self.chain:
                there = look.at(warped(look.image, *positions(warps)))
        return warps
