"""Requests to read attention while a prompt is read; the attention engine serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit

__all__ = ["DecoderProbe", "VisionProbe"]


@dataclass(frozen=True)
class DecoderProbe:
    """
    Reads attention weights of prompt rows of one decoder layer, after any edits, while the prompt is read.

    Attributes
    ----------
    layer
        Decoder layer, 0-based.
    rows
        Named row selection (see `AttentionMethod.rows`).
    receive
        Called with weights ``[B, H, R, N]`` float32 and ``[B, R]`` bool that is False for filler rows.
    hears
        Called instead, with the rows' indices ``[B, R]`` and the call besides (see `RowReader`).
    on_decode
        Read tokens that continue the prompt too; there, rows are all new tokens.
    wanted
        Asked at every call whether anybody listens now; None: always.
    """

    layer: int
    rows: str
    receive: Callable[[Tensor, Tensor], None] | None = None
    hears: Callable[[Tensor, Tensor, Tensor, Edit], None] | None = None
    on_decode: bool = False
    wanted: Callable[[], bool] | None = None


@dataclass(frozen=True)
class VisionProbe:
    """
    Reads attention in one layer of the vision tower.

    Attributes
    ----------
    layer
        Vision layer, 0-based.
    kind
        ``"cls"``: the row of the class token, ``[crops, H, patches]`` without the class column, not renormalised.
        ``"cls_wide"``: the same with all heads as one, ``[crops, 1, patches]``. ``"received"``: mean over query rows,
        ``[crops, H, patches]``, class row and column left out where there is one; ``"global"``: class row not left out.
        ``"keys"``: ``[crops, H, patches, d]``. ``"map"``: what ``of_map`` makes of queries, keys and scaling,
        ``[crops, 1, patches]``.
    receive
        Called once per attention call: once per crop batch (CLIP-like), once per image or window (Qwen-like).
    """

    layer: int
    kind: str
    receive: Callable[[Tensor], None]
    of_map: Callable[[Tensor, Tensor, float], Tensor] | None = None
