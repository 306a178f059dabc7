"""
Methods that multiply logits of key segments, or outputs of heads, the slow way: one head, row and key at a time.

Everything is an edit for `tests.reference.attention.dense_attention`; key j is image, system prompt, or neither.
"""

from __future__ import annotations

import math
from collections.abc import Container

from torch import Tensor

from tests.reference.attention import Edit

PAD = 0


def image_keys(prompt_ids: Tensor, row: int, image_token: int) -> list[int]:
    """Columns of one row that hold visual tokens."""
    return [j for j, token in enumerate(prompt_ids[row].tolist()) if token == image_token]


def last_column(prompt_ids: Tensor, row: int) -> int:
    """Column of the last prompt token of one row."""
    return max(j for j, token in enumerate(prompt_ids[row].tolist()) if token != PAD)


def vaf(
    image_token: int,
    prompt_ids: Tensor,
    layers: Container[int],
    enh: float,
    sup: float,
    head_fraction: float = 1.0,
    dropped: Container[tuple[int, int]] = (),
) -> Edit:
    """Visual amplification fusion on logits before the mask; ``dropped`` (row, column) keys are not there at all."""

    def edit(layer: int, logits: Tensor, row: int, hidden: Tensor) -> Tensor:
        ids = prompt_ids[row].tolist()
        images = image_keys(prompt_ids, row, image_token)
        if layer not in layers or not images:
            return logits
        heads = range(logits.shape[0])
        if head_fraction < 1:
            # Image mass of the last prompt row under the softmax over the keys it may see.
            last = last_column(prompt_ids, row)
            seen = [j for j in range(last + 1) if ids[j] != PAD and (row, j) not in dropped]
            mass = []
            for h in heads:
                total = sum(math.exp(float(logits[h, last, j])) for j in seen)
                mass.append(sum(math.exp(float(logits[h, last, j])) / total for j in seen if j in images))
            heads = sorted(heads, key=lambda h: -mass[h])[: int(head_fraction * len(mass))]
        for h in heads:
            for i in range(logits.shape[1]):
                is_text_after_image = i > images[0] and i not in images and (i >= len(ids) or ids[i] != PAD)
                if not is_text_after_image:
                    continue
                for j in range(logits.shape[2]):
                    if j in images:
                        logits[h, i, j] = enh * logits[h, i, j]
                    elif j < images[0] and ids[j] != PAD:
                        logits[h, i, j] = sup * logits[h, i, j]
        return logits

    return edit


def confidence(logits: Tensor) -> float:
    """Probability of the likeliest token of ``logits [vocabulary]``, two decimals."""
    values = logits.tolist()
    largest = max(values)
    return round(1 / sum(math.exp(value - largest) for value in values), 2)


def scaling_vis(image_token: int, prompt_ids: Tensor, weights: list[float]) -> Edit:
    """ScalingVis on logits before the mask, with one weight per row of the batch; only the last prompt row."""

    def edit(layer: int, logits: Tensor, row: int, hidden: Tensor) -> Tensor:
        for h in range(logits.shape[0]):
            for j in image_keys(prompt_ids, row, image_token):
                i = last_column(prompt_ids, row)
                logits[h, i, j] = weights[row] * logits[h, i, j]
        return logits

    return edit


def spin(
    image_token: int,
    prompt_ids: Tensor,
    keep_ratio: float,
    gain: float,
    layers: Container[int],
    mass: bool = False,
) -> dict[str, Edit]:
    """Image-guided head suppression: scores from logits or weights, gains on head outputs of last and later rows."""
    scores: dict[tuple[int, int], list[list[float]]] = {}

    def score(layer: int, values: Tensor, row: int, hidden: Tensor) -> Tensor:
        images = image_keys(prompt_ids, row, image_token)
        scores[layer, row] = [
            [sum(float(values[h, i, j]) for j in images) for h in range(values.shape[0])]
            for i in range(values.shape[1])
        ]
        return values

    def suppress(layer: int, outputs: Tensor, row: int, hidden: Tensor) -> Tensor:
        if layer not in layers or not image_keys(prompt_ids, row, image_token):
            return outputs
        num_heads = outputs.shape[0]
        for i in range(last_column(prompt_ids, row), outputs.shape[1]):
            best = sorted(range(num_heads), key=lambda h: -scores[layer, row][i][h])[: int(keep_ratio * num_heads)]
            for h in range(num_heads):
                if h not in best:
                    outputs[h, i] = gain * outputs[h, i]
        return outputs

    return {"edit" if mass else "scores": score, "output": suppress}
