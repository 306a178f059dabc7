"""Gaze-shift guided fusion the slow way: two readings of the prompt, one head, token and key at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tests.reference.attention import Edit, dense_attention, full_logits


def read_maps(model: Any, inputs: dict[str, Any], layers: Sequence[int]) -> dict[int, dict[int, Tensor]]:
    """Full attention ``[H, N, N]`` of some layers of the unpatched model, by layer and row of the batch."""
    maps: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}

    def record(layer: int, weights: Tensor, row: int, hidden: Tensor) -> Tensor:
        if layer in maps:
            maps[layer][row] = weights.clone()
        return weights

    with dense_attention(model, record):
        full_logits(model, inputs)
    return maps


def image_and_question(ids: Sequence[int], image_token: int, skip: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Positions of image and question in a row that is padded on the left."""
    image = [j for j, token in enumerate(ids) if token == image_token]
    if not image:
        return [], []
    return image, list(range(image[-1] + 1 + skip[0], len(ids) - skip[1]))


def saliency(maps: Sequence[Tensor], image: Sequence[int], counted: Sequence[int], alpha: float) -> dict[int, float]:
    """S by image position, from attention ``[H, N, N]`` of each saliency layer."""
    shifts: dict[int, list[float]] = {v: [] for v in image}
    for a in maps:
        num_heads = a.shape[0]
        d = [[[max(float(a[h, t, v] - a[h, t - 1, v]), 0.0) for v in image] for t in counted] for h in range(num_heads)]
        totals = [sum(sum(row) for row in d[h]) for h in range(num_heads)]
        for h in sorted(range(num_heads), key=lambda h: -totals[h])[: num_heads // 2]:
            for row in d[h]:
                for v, value in zip(image, row, strict=True):
                    shifts[v].append(value)
    m = {v: sum(values) / len(values) for v, values in shifts.items()}
    centre, spread = statistics.mean(m.values()), statistics.stdev(m.values())
    m = {v: min(max(value, centre - 3 * spread), centre + 3 * spread) for v, value in m.items()}
    low, high = min(m.values()), max(m.values())
    return {v: math.exp(alpha * (value - low) / (high - low)) for v, value in m.items()}


def enhance_row(w: Tensor, s: dict[int, float], image: Sequence[int], question: Sequence[int]) -> Tensor:
    """One query row ``[H, N]``."""
    w = w.clone()
    heads = range(w.shape[0])
    half = w.shape[0] // 2
    looking = sorted(heads, key=lambda h: -sum(float(w[h, v]) for v in image))[:half]
    r0 = sum(float(w[h, v]) for h in looking for v in image)
    for h in looking:
        for v in image:
            w[h, v] *= s[v]
    r1 = sum(float(w[h, v]) for h in looking for v in image)
    c = r1 / r0
    for h in sorted(heads, key=lambda h: -sum(float(w[h, t]) for t in question))[:half]:
        for t in question:
            w[h, t] *= c
    for h in heads:
        w[h] = w[h] / w[h].sum()
    return w


def gift(
    model: Any,
    inputs: dict[str, Any],
    image_token: int,
    saliency_layers: Sequence[int],
    enhancement_layers: Sequence[int],
    alpha: float,
    skip: tuple[int, int],
    gone: dict[int, set[int]] | None = None,
) -> Edit:
    """Every token of the question counts; ``gone`` are positions that the enhancement layers do not see, by row."""
    ids = inputs["input_ids"].tolist()
    maps = read_maps(model, inputs, saliency_layers)
    found: dict[int, dict[int, float]] = {}
    for row, tokens in enumerate(ids):
        image, question = image_and_question(tokens, image_token, skip)
        if image and question:
            found[row] = saliency([maps[layer][row] for layer in saliency_layers], image, question, alpha)

    def edit(layer: int, weights: Tensor, row: int, hidden: Tensor) -> Tensor:
        if layer in enhancement_layers and row in found:
            image, question = image_and_question(ids[row], image_token, skip)
            image = [v for v in image if v not in (gone or {}).get(row, ())]
            for i in range(len(ids[row]) - 1, weights.shape[1]):
                weights[:, i] = enhance_row(weights[:, i], found[row], image, question)
        return weights

    return edit
