"""
Detectors of attention sinks: functions on the valid tokens of one prompt, each a different kind of evidence.

Numbers D1 to D8 are those under which a report names them. Sources: D1, D2 VAR (2503.03321); D3 "Massive Activations in
Large Language Models" (2402.17762); D4 2510.22603; D5 ACT (2406.15765), the head-wise share after "When Attention Sink
Emerges" (ICLR 2025); D8 "Vision Transformers Need Registers" (2309.16588). None of them decides alone: `label` asks for
the hidden state and a second kind of evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.attention.sinks import sink_scores

__all__ = [
    "Criteria",
    "contribution",
    "cosine_to_first",
    "label",
    "low_value",
    "magnet_share",
    "massive",
    "norm_threshold",
    "receives",
    "sink_scores",
    "top_activations",
]


@dataclass(frozen=True)
class Criteria:
    """
    Thresholds of the detectors.

    Attributes
    ----------
    tau
        D1 and D2, on the score in units of the row's RMS; never above ``sqrt(D)``. None: 20, or 0.3125 sqrt(D) below
        width 2048.
    magnitude, ratio
        D3: least magnitude of an activation, and its least ratio to the median magnitude of the layer. Paper: 100 and
        about 1000; 100 is a common relaxed ratio for checkpoints with larger medians.
    cosine
        D4: least cosine similarity to the first token, in [-1, 1]. Own choice (UNVERIFIED).
    received
        D5: received attention in multiples of an even share ``1 / N``. ACT: 5 (UNVERIFIED in its code).
    strong
        D5 for D6, as an absolute share. ACT's code: 0.1.
    min_rows
        A key seen by fewer probe rows is not judged by its attention.
    head_received
        Received attention above which a head counts for the head-wise share. 0.3 (UNVERIFIED).
    value_iqr
        D6: interquartile ranges below the median.
    norm_iqr, norm_ratio
        D8: interquartile ranges above the third quartile, and least multiple of the median. The ratio is our own
        (UNVERIFIED); LLaVA-1.5's outliers are about twice the rest.
    magnet_rows, magnet_layers
        Least share of the rows, and of the deep half of the layers, that favour a stop-word magnet. Own choice
        (UNVERIFIED): RefAM (2509.22650), which names the effect, has published no criterion.

    Raises
    ------
    MethodError
        A value out of range.
    """

    tau: float | None = None
    magnitude: float = 100.0
    ratio: float = 1000.0
    cosine: float = 0.9
    received: float = 5.0
    strong: float = 0.1
    min_rows: int = 8
    head_received: float = 0.3
    value_iqr: float = 2.0
    norm_iqr: float = 3.0
    norm_ratio: float = 1.5
    magnet_rows: float = 0.9
    magnet_layers: float = 0.5

    def __post_init__(self) -> None:
        positive = ("tau", "magnitude", "ratio", "received", "min_rows", "value_iqr", "norm_iqr", "norm_ratio")
        shares = ("strong", "head_received", "magnet_rows", "magnet_layers")
        for name in positive:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise MethodError(f"sinks: {name} is {value}; it must be positive")
        for name in shares:
            if not 0 < getattr(self, name) <= 1:
                raise MethodError(f"sinks: {name} is {getattr(self, name)}; it must lie in (0, 1]")
        if not -1 <= self.cosine <= 1:
            raise MethodError(f"sinks: cosine is {self.cosine}; it must lie in [-1, 1]")


def massive(hidden: Tensor, magnitude: float, ratio: float) -> tuple[Tensor, Tensor, float]:
    """
    D3: positions with an activation that is large, and large against the median of the layer.

    Parameters
    ----------
    hidden
        ``[N, D]`` float32.
    magnitude, ratio
        See `Criteria`.

    Returns
    -------
    tuple
        ``[N]`` bool, each position's largest magnitude ``[N]``, and the median magnitude over all positions.
    """
    size = hidden.abs()
    peak, median = size.amax(dim=-1), float(size.median())
    return (peak > magnitude) & (peak > ratio * median), peak, median


def top_activations(hidden: Tensor, count: int = 3) -> list[tuple[float, int, int]]:
    """The largest activations of ``hidden [N, D]`` as (value with sign, position, channel), largest magnitude first."""
    flat = hidden.flatten()
    chosen = flat.abs().topk(min(count, len(flat))).indices.tolist()
    return [(float(flat[i]), i // hidden.shape[1], i % hidden.shape[1]) for i in chosen]


def cosine_to_first(hidden: Tensor) -> Tensor:
    """D4: cosine similarity ``[N]`` of every position of ``hidden [N, D]`` to the first; 1 there."""
    # Rounding may carry parallel vectors past 1, and out of a histogram.
    return torch.nn.functional.cosine_similarity(hidden, hidden[:1], dim=-1).clamp(-1, 1)


def receives(received: Tensor, seen: Tensor, factor: float, min_rows: int) -> Tensor:
    """
    D5: keys that receive much more attention than an even share.

    Parameters
    ----------
    received
        ``[N]`` mean attention over heads and over the probe rows that can see a key.
    seen
        ``[N]`` how many rows that is.
    factor
        Multiple of ``1 / N``.
    min_rows
        Keys seen by fewer rows are never marked.

    Returns
    -------
    Tensor
        ``[N]`` bool.
    """
    return (received > factor / len(received)) & (seen >= min_rows)


def low_value(norms: Tensor, received: Tensor, seen: Tensor, spread: float, strong: float, min_rows: int) -> Tensor:
    """
    D6: much attention, little content.

    Parameters
    ----------
    norms
        ``[N]`` norm of the value vector over all key/value heads.
    received, seen
        As in `receives`.
    spread
        Interquartile ranges below the median.
    strong
        Least received attention, an absolute share.
    """
    low, middle, high = norms.quantile(torch.tensor([0.25, 0.5, 0.75], device=norms.device)).tolist()
    return (norms < middle - spread * (high - low)) & (received > strong) & (seen >= min_rows)


def contribution(received: Tensor, values: Tensor, project: torch.nn.Module) -> Tensor:
    """
    D7: what a key really adds to the residual stream of the probe rows.

    The norm of the rows' mean contribution ``sum_h A[h, i, j] v[h, j] W_o``: since W_o is linear, the mean weight of
    every head goes through the projection once, instead of every pair of row and key.

    Parameters
    ----------
    received
        ``[H, N]`` mean weight of the rows on every key.
    values
        ``[Hkv, N, d]``, H a multiple of Hkv.
    project
        The attention's output projection ``[..., H d]`` to ``[..., D]``; a bias in it is taken off.

    Returns
    -------
    Tensor
        ``[N]`` float32.
    """
    heads, length = received.shape
    repeated = values.repeat_interleave(heads // values.shape[0], dim=0)
    weighted = received[..., None].to(repeated.dtype) * repeated
    joined = weighted.transpose(0, 1).reshape(length, -1)
    return (project(joined) - project(torch.zeros_like(joined[:1]))).float().norm(dim=-1)


def norm_threshold(norms: Tensor, spread: float, ratio: float) -> float:
    """
    D8: the norm above which the features of an image ``[N]`` are outliers.

    Third quartile plus ``spread`` interquartile ranges, and at least ``ratio`` times the median: among thousands of
    ordinary norms some always lie beyond any fence.
    """
    low, middle, high = norms.quantile(torch.tensor([0.25, 0.5, 0.75], device=norms.device)).tolist()
    return max(high + spread * (high - low), ratio * middle)


def magnet_share(weights: Tensor, seen: Tensor, factor: float) -> Tensor:
    """
    Share of the rows that favour a key, as a magnet is favoured by nearly all of them.

    Parameters
    ----------
    weights
        ``[R, N]`` attention rows, mean over heads; 0 where a row cannot see a key.
    seen
        ``[N]`` rows that can see a key.
    factor
        A row favours a key with more than this multiple of an even share ``1 / N``.

    Returns
    -------
    Tensor
        ``[N]`` in [0, 1].
    """
    return (weights > factor / weights.shape[1]).sum(dim=0) / seen.clamp(min=1)


def label(marks: Mapping[str, Sequence[bool]], channels_known: bool) -> list[str | None]:
    """
    Final label of every position of a layer.

    The hidden state proposes: D1 where sink channels are known, otherwise D3 or D4. A second detector has to agree: D3,
    D4, D5 or D6, one that did not propose; agreement with itself is no evidence of the first token, whose cosine is 1.

    Parameters
    ----------
    marks
        ``D1`` and ``D3`` to ``D6``, each ``[N]``.
    channels_known
        Whether D1 was read.

    Returns
    -------
    list
        ``"sink"``; ``"unconfirmed"``: proposed, nothing agrees; ``"attention only"``: D5 without a proposal; or None.
    """
    labels: list[str | None] = []
    for position in range(len(marks["D3"])):
        spoke = {name for name, mark in marks.items() if mark[position]}
        if position == 0:
            spoke.discard("D4")
        proposed = spoke & ({"D1"} if channels_known else {"D3", "D4"})
        if proposed:
            labels.append("sink" if spoke - proposed or len(proposed) > 1 else "unconfirmed")
        else:
            labels.append("attention only" if "D5" in spoke else None)
    return labels
