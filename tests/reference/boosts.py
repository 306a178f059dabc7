"""
Methods that raise image logits of the row being predicted, the slow way: one layer, head, row and key at a time.

For `tests.reference.attention.dense_attention`, whose logits cover prompt and answer: the rows that predict tokens are
the last of the prompt and all that follow it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.attention import Edit

#: Per row of the batch, position of a key to the strength of its boost.
Strengths = Sequence[dict[int, float]]


def boosted(strengths: Strengths, prompt: int, layers: Sequence[int], first_row: int | None = None) -> Edit:
    """``l + s |l|``; ``first_row`` is where the edit starts, None: the last row of a prompt of ``prompt`` tokens."""
    start = prompt - 1 if first_row is None else first_row

    def edit(layer: int, logits: Tensor, row: int, hidden: Tensor) -> Tensor:
        if layer not in layers:
            return logits
        for head in range(logits.shape[0]):
            for i in range(start, logits.shape[1]):
                for j, strength in strengths[row].items():
                    value = float(logits[head, i, j])
                    logits[head, i, j] = value + strength * abs(value)
        return logits

    return edit


def heads_guided(alpha: float, image_keys: Sequence[Sequence[int]], prompt: int, layers: Sequence[int]) -> Edit:
    """Every head adds alpha times what all heads give a key on average, without sign."""

    def edit(layer: int, logits: Tensor, row: int, hidden: Tensor) -> Tensor:
        if layer not in layers:
            return logits
        heads = logits.shape[0]
        for i in range(prompt - 1, logits.shape[1]):
            for j in image_keys[row]:
                mean = sum(abs(float(logits[head, i, j])) for head in range(heads)) / heads
                for head in range(heads):
                    logits[head, i, j] = float(logits[head, i, j]) + alpha * mean
        return logits

    return edit


def percentile(values: Sequence[float], q: float) -> float:
    """Between the two nearest of the sorted values, in proportion."""
    ordered = sorted(values)
    place = q / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def salient_groups(first: Sequence[float], late: Sequence[float], ratio: float) -> tuple[set[int], set[int]]:
    """Local and global tokens of one image, numbered within it; tokens of no place (NaN) are not counted."""
    shown = [v for v, value in enumerate(first) if not math.isnan(value)]
    local = set(sorted(shown, key=lambda v: (-first[v], v))[: math.floor(len(shown) * ratio)])
    q1, q3 = (percentile([late[v] for v in shown], q) for q in (25, 75))
    num_outliers = sum(late[v] > q3 + 1.5 * (q3 - q1) for v in shown)
    # floor(V * ratio) with ratio = outliers / V
    outliers = set(sorted(shown, key=lambda v: (-late[v], v))[:num_outliers])
    return local - outliers, outliers


def guided(main: Tensor, text: Tensor, gamma: float, cut: float) -> Tensor:
    """Log-probabilities with image against those without, one token at a time, for one row."""
    if gamma == 1:
        return main.log_softmax(dim=-1)
    c, u = main.log_softmax(dim=-1).tolist(), text.log_softmax(dim=-1).tolist()
    threshold = (math.log(cut) if cut else -math.inf) + max(c)
    out = [gamma * (c[v] - u[v]) + u[v] if c[v] >= threshold else -math.inf for v in range(len(c))]
    return torch.tensor(out).log_softmax(dim=-1)
