"""
Attention calibration: sinks that appear behind the first token are shrunk, in heads where that was found to help.

A key is a sink of a head when the rows that see it pay it much attention on average. All sinks but the first are scaled
down in every row and the freed mass goes to all other keys in proportion to their weights. A method for text models,
applied unchanged to the mixed sequence: prompts without an image are edited too.

Differs from the released code where that is broken. While an answer is generated it detects sinks anew from one row and
leaves rows that do not sum to one: here the sinks of the prompt stay. It reads the first sample of a batch only: here
every sample has its own sinks, padding counts nowhere. The code marks keys above a constant, which is the default; the
paper those above ``alpha / N``, of which the released code has no trace: ``thr_mode="relative"`` (UNVERIFIED).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lmmhooks.methods.attention.base import AttentionContext, SegmentMethod
from lmmhooks.methods.base import names_record, setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Act", "calibrated_factors", "later_sinks"]

HeadList = tuple[tuple[int, tuple[int, ...]], ...]


def later_sinks(received: Tensor, seen: Tensor, threshold: Tensor, min_rows: int) -> Tensor:
    """
    Keys above a threshold, without the first of them.

    Parameters
    ----------
    received
        ``[B, H, N]`` mean attention a key receives from the rows that see it.
    seen
        ``[B, N]`` how many rows that is.
    threshold
        ``[B]``.
    min_rows
        Keys that fewer rows see are no sinks.

    Returns
    -------
    Tensor
        ``[B, H, N]`` bool.
    """
    detected = (received > threshold[:, None, None]) & (seen >= max(min_rows, 1))[:, None]
    return detected & (detected.cumsum(dim=-1) > 1)


def calibrated_factors(mass: Tensor, rest: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """
    Factors on sinks and on all other keys of a row, after which its sum is what it was.

    Parameters
    ----------
    mass, rest
        Attention on sinks and on everything else, any shape.
    beta
        Factor kept on sinks.

    Returns
    -------
    tuple
        Both 1 where a row looks at nothing but sinks: there is nowhere to move mass to.
    """
    movable = rest > 0
    inside = torch.where(movable, beta, torch.ones_like(mass))
    return inside, torch.where(movable, 1 + (1 - beta) * mass / rest.where(movable, 1.0), 1.0)


@dataclass(frozen=True)
class Act(SegmentMethod):
    """Attention calibration technique (see the module docstring)."""

    id: ClassVar[str] = "act"
    paper: ClassVar[str] = (
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration, ICML 2024, 2406.15765"
    )
    code: ClassVar[str] = "https://github.com/GATECH-EIC/ACT"
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {"heads": "command"}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"thr_mode": "relative"},
        "mt-bench": {"thr": 0.15},  # released MT-bench script
    }

    heads: Any = setting(
        None,
        help="Edited heads. None: the list that `lmmhooks calibrate act` found for this checkpoint; a path ending in "
        ".json: such a list; a mapping of layers to lists of heads, both 0-based; 'all', which the paper does not do.",
    )
    beta: float = setting(0.4, help="Factor kept on sinks, in [0, 1]; 1 changes nothing. Paper and code: 0.4.")
    thr: float = setting(
        0.1, help="Mean received attention above which a key is a sink, in [0, 1]. Code: 0.1, MT-bench script 0.15."
    )
    thr_mode: Literal["absolute", "relative"] = setting(
        "absolute", help="'absolute': thr (released code); 'relative': alpha / N for N real tokens (paper, UNVERIFIED)."
    )
    alpha: float = setting(5.0, help="Multiple of the mean attention 1 / N, positive; only with 'relative'. Paper: 5.")
    min_rows: int = setting(
        1,
        help="Keys that fewer prompt rows see are no sinks, at least 1; about 8 leaves out the last tokens, whose mean "
        "is noise. Code: 1.",
    )
    exclude_image: bool = setting(
        False, help="Never shrink visual tokens; for use beside a method that handles visual sinks, such as var."
    )
    skip_layers: tuple[int, ...] = setting(
        (0, 1, -1), help="Layers left alone; negative counts from the end. Code: 0, 1, last."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        if self.heads is not None and not isinstance(self.heads, str):
            object.__setattr__(self, "heads", self._head_list())
        named = not isinstance(self.heads, str) or self.heads == "all" or names_record(self.heads)
        self._require(
            named, "heads", "'all', a path that ends in .json, a mapping of layers to lists of heads, or None"
        )
        self._require(0.0 <= self.beta <= 1.0, "beta", "in [0, 1]")
        self._require(0.0 <= self.thr <= 1.0, "thr", "in [0, 1]")
        self._require(self.thr_mode in ("absolute", "relative"), "thr_mode", "'absolute' or 'relative'")
        self._require(self.alpha > 0, "alpha", "positive")
        self._require(self.min_rows >= 1, "min_rows", "at least 1")

    def _head_list(self) -> HeadList:
        pairs = self.heads.items() if isinstance(self.heads, Mapping) else self.heads
        try:
            listed = [(int(layer), tuple(sorted({int(head) for head in heads}))) for layer, heads in pairs]
        except (TypeError, ValueError):
            listed = None
        once = listed is not None and len({layer for layer, _ in listed}) == len(listed)
        self._require(once, "heads", "a mapping of layer numbers to lists of head numbers, such as {2: [0, 5]}")
        return tuple(sorted((layer, heads) for layer, heads in listed or () if heads))

    def check(self, family: Any) -> None:
        depth, width = family.num_layers, family.num_heads
        inside = all(-depth <= layer < depth for layer in self.skip_layers)
        self._require(inside, "skip_layers", f"layers of this model, which has {depth}")
        if isinstance(self.heads, tuple):
            fits = all(0 <= layer < depth and min(heads) >= 0 and max(heads) < width for layer, heads in self.heads)
            self._require(fits, "heads", f"a list for this model, which has layers 0 to {depth - 1} of {width} heads")
            skipped = {layer % depth for layer in self.skip_layers} & {layer for layer, _ in self.heads}
            self._require(not skipped, "heads", f"without layers that skip_layers={self.skip_layers} leaves alone")

    @property
    def is_identity(self) -> bool:
        return self.beta == 1 or self.heads == () or (self.thr_mode == "absolute" and self.thr == 1)

    def layers(self, family: Any) -> Sequence[int]:
        skipped = {layer % family.num_layers for layer in self.skip_layers}
        listed = range(family.num_layers) if self.heads == "all" else [layer for layer, _ in self.heads]
        return [layer for layer in listed if layer not in skipped]

    def edited_heads(self, layer: int, family: Any) -> Sequence[int] | None:
        return None if self.heads == "all" else dict(self.heads)[layer]

    def choose(self, received: Tensor, seen: Tensor, context: AttentionContext) -> Tensor:
        num_tokens = (seen > 0).sum(dim=1)
        relative = self.thr_mode == "relative"
        threshold = self.alpha / num_tokens if relative else torch.full_like(num_tokens, self.thr, dtype=torch.float32)
        chosen = later_sinks(received, seen, threshold, self.min_rows)
        return chosen & ~context.layout.visual[:, None] if self.exclude_image else chosen

    def factors(self, mass: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        return calibrated_factors(mass, rest, self.beta)
