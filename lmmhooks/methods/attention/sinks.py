"""How much a position looks like an attention sink, by its hidden state; shared by methods and diagnosis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sink_scores", "sink_threshold"]


def sink_scores(hidden: Tensor, dims: Sequence[int] | None) -> Tensor:
    """
    Largest magnitude among some channels, in units of the row's RMS.

    Parameters
    ----------
    hidden
        ``[..., N, D]`` residual stream before the norm of a layer.
    dims
        Sink channels, or None for the largest over all channels.

    Returns
    -------
    Tensor
        ``[..., N]`` float32 in ``[0, sqrt(D)]``; with the energy in two channels alike it stays below ``sqrt(D / 2)``.
    """
    x = hidden.float()
    rms = (x.square().mean(dim=-1) + 1e-6).sqrt()
    chosen = x if dims is None else x[..., list(dims)]
    return chosen.abs().amax(dim=-1) / rms


def sink_threshold(width: int) -> float:
    """Threshold on the score for a model of width D: 20 (VAR paper), or 0.3125 sqrt(D) below 2048 (UNVERIFIED)."""
    return 20.0 if width >= 2048 else 0.3125 * math.sqrt(width)
