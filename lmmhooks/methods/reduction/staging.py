"""Cuts at several layers inside the decoder: which layers they are on a decoder of another depth, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.base import Newline, ReductionMethod, Scope

__all__ = ["PUBLISHED_DEPTH", "StagedMethod", "scaled_layers"]

PUBLISHED_DEPTH = 32
"""Decoder layers of LLaVA-1.5-7B, for which layer numbers are published."""


def scaled_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """
    Layers of a decoder of `PUBLISHED_DEPTH` layers at the same relative depth of another one.

    Parameters
    ----------
    layers
        0-based, increasing.
    num_layers
        Depth of the other decoder.

    Returns
    -------
    tuple
        Rounded to the nearest layer, halves to even; at least 1 and increasing, so that a shallow decoder may run past
        its last layer.
    """
    out: list[int] = []
    for layer in layers:
        out.append(max(round(layer * num_layers / PUBLISHED_DEPTH), 1, out[-1] + 1 if out else 1))
    return tuple(out)


@dataclass(frozen=True)
class StagedMethod(ReductionMethod):
    """
    Base of methods that cut at a list of layers, all images of a prompt together as the one span of released code.

    How many tokens stay is theirs to say (or that of ``budget``); there is no ``keep``.
    """

    cut_settings: ClassVar[tuple[str, ...]] = ("layers",)
    published_layers: ClassVar[tuple[int, ...]]
    """Default of `layers` on a decoder of `PUBLISHED_DEPTH` layers."""

    keep: None = field(default=None, init=False)
    newline: Newline = setting(
        "rank", help="Newline tokens: 'rank' them as released; or 'drop', 'keep_per_row', 'per_kept_row'."
    )
    layers: tuple[int, ...] | None = setting(
        None,
        help="Decoder layers, 0-based, increasing, from 1 on; one past the last does nothing. None: the published "
        "ones, scaled from 32 layers to the depth of the model.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            numbers = all(isinstance(layer, int) and layer >= 1 for layer in self.layers)
            self._require(
                numbers and bool(self.layers) and sorted(set(self.layers)) == list(self.layers),
                "layers",
                "increasing decoder layers from 1 on, such as (8, 16, 24)",
            )

    @property
    def scope(self) -> Scope:
        return "sample"

    def stage_layers(self, family: Any) -> tuple[int, ...]:
        """The layers on this model, those past its last included."""
        return scaled_layers(self.published_layers, family.num_layers) if self.layers is None else self.layers

    def _check_shares(self, name: str, least: float = 0.0) -> None:
        """Refuse shares outside [least, 1], or of another number than there are layers."""
        shares = getattr(self, name)
        wanted = len(self.published_layers if self.layers is None else self.layers)
        valid = all(isinstance(share, (int, float)) and least <= share <= 1 for share in shares)
        self._require(
            valid and len(shares) == wanted, name, f"{wanted} shares in [{least:g}, 1], one for every layer in layers"
        )
