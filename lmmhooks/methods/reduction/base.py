"""
Contract of reduction methods: which visual tokens stay, where in the model the others leave, and what is merged.

Shapes: G groups that are reduced together (all of equal length), V visual tokens of a group, K kept ones, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lmmhooks.methods.base import Method, setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cut", "Probe", "ReductionMethod", "TokenGroup", "num_kept"]

Positions = Literal["auto", "keep", "repack"]


@dataclass(frozen=True)
class Cut:
    """
    A place where visual tokens leave.

    Attributes
    ----------
    layer
        Decoder layer, 0-based; the cut happens on its input. 0: after the projector, before any decoder layer.
    keep
        Tokens kept of every group: an int, or a float share in (0, 1] of the tokens the group had in the prompt.
    """

    layer: int
    keep: int | float


@dataclass(frozen=True)
class Probe:
    """
    A signal that a method scores tokens by.

    Attributes
    ----------
    signal
        ``"vision_cls"``: attention of the class token in vision layer ``layer``, per patch. ``"vision_received"``: mean
        attention a patch receives there. ``"decoder_row"``: attention of the last prompt row in decoder layer ``layer``.
        Head mean, float32, after the softmax, not renormalised.
    layer
        Vision or decoder layer, 0-based.
    """

    signal: Literal["vision_cls", "vision_received", "decoder_row"]
    layer: int

    @property
    def name(self) -> str:
        """Key under which the values appear in `TokenGroup.probes`."""
        return f"{self.signal}[{self.layer}]"


@dataclass(frozen=True)
class TokenGroup:
    """
    Groups of visual tokens that one call reduces: crops, images or whole prompts, all with equally many tokens.

    Attributes
    ----------
    states
        ``[G, V, D]`` hidden states at the cut, in sequence order.
    num_keep
        K, between 0 and V.
    probes
        Values of the method's probes, ``[G, V]`` float32 each.
    row, col
        ``[V]`` long, CPU: cell of every token in its crop's grid (-1: unknown); shared by the groups.
    grid
        Rows and columns of the crop's token grid, or None when unknown or when a group spans several crops.
    seeds
        One integer per group, a hash of the prompt it belongs to: the same for every batch the prompt appears in.
    """

    states: Tensor
    num_keep: int
    probes: dict[str, Tensor]
    row: Tensor
    col: Tensor
    grid: tuple[int, int] | None
    seeds: tuple[int, ...]


def num_kept(keep: int | float, num_tokens: int) -> int:
    """Tokens kept of ``num_tokens``: an int is capped at the length, a share is rounded down but keeps at least one."""
    if isinstance(keep, float):
        return min(num_tokens, max(1, int(keep * num_tokens)))
    return min(keep, num_tokens)


@dataclass(frozen=True)
class ReductionMethod(Method):
    """
    Removes visual tokens from the prompt; everything else about them (gathering states, positions, masks, caches of
    different length per layer, decode steps) is the engine's business.
    """

    kind: ClassVar[str] = "reduction"
    scope: ClassVar[Literal["crop", "image", "sample"]] = "crop"
    """What is reduced on its own: every crop, every image, or all visual tokens of a prompt together."""

    keep: int | float | None = setting(
        None, help="Visual tokens kept per image: a count (128), or a share in (0, 1] of the tokens the image has."
    )
    positions: Positions = setting(
        "auto",
        help="'keep' leaves survivors their original positions, 'repack' renumbers them without gaps; 'auto' is what the "
        "authors' code does: repack on models with one-dimensional positions, keep on M-RoPE models.",
    )

    def __post_init__(self) -> None:
        if self.keep is not None:
            share = isinstance(self.keep, float) and 0 < self.keep <= 1
            count = isinstance(self.keep, int) and not isinstance(self.keep, bool) and self.keep >= 0
            self._require(share or count, "keep", "a token count >= 0 or a share in (0, 1]")
        self._require(self.positions in ("auto", "keep", "repack"), "positions", "'auto', 'keep' or 'repack'")

    def cuts(self, family: Any) -> list[Cut]:
        """Where and how far the prompt shrinks, by ascending layer. Default: once, before the decoder."""
        self._require(self.keep is not None, "keep", "given: a token count or a share in (0, 1]")
        assert self.keep is not None
        return [Cut(0, self.keep)]

    def probes(self, family: Any) -> list[Probe]:
        """Signals the selection needs."""
        return []

    def select(self, tokens: TokenGroup) -> Tensor:
        """
        Choose the tokens that stay.

        Returns
        -------
        Tensor
            ``[G, K]`` long, local indices in ``[0, V)``, in the order in which the decoder shall see them (ascending:
            raster order), unique within a group.
        """
        raise NotImplementedError

    def merge(self, tokens: TokenGroup, index: Tensor) -> Tensor | None:
        """New states ``[G, K, D]`` of the kept tokens, or None when they keep their own."""
        return None
