"""Signals a method may ask the engines to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Probe"]


@dataclass(frozen=True)
class Probe:
    """
    A signal that a method scores tokens by. Head mean, after the softmax, float32 in the decoder, not renormalised.

    Attributes
    ----------
    signal
        ``"vision_cls"``: attention of the class token in vision layer ``layer``. ``"vision_received"``: mean
        attention a patch receives there. ``"decoder_rows"``: attention that prompt rows of decoder layer ``layer``
        pay, mean over the rows.
    layer
        Vision or decoder layer, 0-based. A decoder layer must lie before the cut that reads it.
    rows
        For ``"decoder_rows"``: ``"last"`` prompt row, text rows ``"after_image"``, or ``"all"``.
    """

    signal: Literal["vision_cls", "vision_received", "decoder_rows"]
    layer: int
    rows: Literal["last", "after_image", "all"] = "last"

    @property
    def name(self) -> str:
        """Key of its values, such as ``"decoder_rows[1, last]"``."""
        return f"{self.signal}[{self.layer}{f', {self.rows}' if self.signal == 'decoder_rows' else ''}]"
