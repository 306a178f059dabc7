"""Signals a method may ask the engines to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.layout import Layout

__all__ = ["Probe", "RowsRead"]

Signal = Literal[
    "vision_cls",
    "vision_cls_wide",
    "vision_received",
    "vision_global",
    "vision_keys",
    "vision_map",
    "vision_states",
    "vision_cls_state",
    "tower_kept",
    "decoder_rows",
    "decoder_states",
]


@dataclass(frozen=True, eq=False)
class RowsRead:
    """
    Attention of some prompt rows of one decoder layer, for `Probe.reduce`; long prompts come in blocks of rows.

    Attributes
    ----------
    weights
        ``[B, H, R, N]`` float32 after the softmax.
    members
        ``[B, R]`` bool: False for rows that only fill the block.
    rows
        ``[B, R]`` long: where they stand in the sequence.
    key, value
        ``[B, Hkv, N, d]`` as attention uses them, after rotary embedding.
    layer
        0-based.
    layout
        Of the sequence this layer sees.
    family
        The resolved model family.
    read
        Value of another probe of the method that lies before this layer, in the coordinates of this sequence.
    memory
        Private to the probe and emptied at every new prompt.
    """

    weights: Tensor
    members: Tensor
    rows: Tensor
    key: Tensor
    value: Tensor
    layer: int
    layout: Layout
    family: Any
    read: Callable[[Probe], Tensor]
    memory: dict[Any, Any]


@dataclass(frozen=True)
class Probe:
    """
    A signal that a method scores tokens by; attention is taken after the softmax and not renormalised.

    Attributes
    ----------
    signal
        One number per token, head mean: ``"vision_cls"``, attention of the class token in vision layer ``layer``;
        ``"vision_cls_wide"``, the same as if all heads were one (PruMerge); ``"vision_received"``, mean attention a
        patch receives from patches, ``"vision_global"`` from patches and class token; ``"tower_kept"``, 1 for tokens
        that came through a reduction inside the tower; ``"vision_map"``, whatever ``of_map`` makes of the attention of
        vision layer ``layer``.

        A vector per token: ``"vision_states"``, output of vision layer ``layer``; ``"vision_cls_state"``, that of the
        class token of the token's crop; ``"vision_keys"``, keys there, heads side by side, with bias, after rotary
        embedding where the tower has one; ``"decoder_states"``, input of decoder layer ``layer``.

        ``"decoder_rows"``: attention that prompt rows of decoder layer ``layer`` pay, mean over rows and heads, or
        whatever ``reduce`` makes of it.
    layer
        Vision or decoder layer, 0-based. A decoder layer must lie before the cut that reads it.
    rows
        For ``"decoder_rows"``: ``"last"`` prompt row, text rows ``"after_image"``, or ``"all"``.
    reduce
        For ``"decoder_rows"``: what is kept, ``[B, C, N]`` or ``[B, N]``, summed over the blocks of rows.
    of_map
        For ``"vision_map"``: from queries and keys ``[crops, H, n, d]``, class token first where there is one, and the
        factor on their products to one number per patch, ``[crops, patches]``.
    label
        Tells probes with different ``reduce`` or ``of_map`` apart.
    ahead
        For ``"decoder_rows"``: the layer is the one before which the method cuts; its attention is computed for the
        rows alone, on what is about to enter it.
    """

    signal: Signal
    layer: int
    rows: Literal["last", "after_image", "all"] = "last"
    reduce: Callable[[RowsRead], Tensor] | None = None
    of_map: Callable[[Tensor, Tensor, float], Tensor] | None = None
    label: str = ""
    ahead: bool = False

    @property
    def name(self) -> str:
        """Key of its values, such as ``"decoder_rows[1, last]"``."""
        details = [str(self.layer)]
        if self.signal == "vision_map":
            details.append(self.label)
        if self.signal == "decoder_rows":
            details += [self.rows, self.label, "ahead" if self.ahead else ""]
        return f"{self.signal}[{', '.join(part for part in details if part)}]"

    @property
    def is_scalar(self) -> bool:
        """One number per token; otherwise values carry a last dimension."""
        if self.signal == "decoder_rows":
            return self.reduce is None
        return self.signal not in ("vision_states", "vision_cls_state", "vision_keys", "decoder_states")
