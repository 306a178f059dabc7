"""
Vision-aware head reinforcement the slow way: the model is run again for every target layer, with and without the image.

Each run scales the heads chosen in the layers below and stops mattering above the layer that is looked at, so the runs
of one layer see what a single climb through the stack would have shown.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import Edit, dense_attention, full_logits
from tests.zoo import END, IMAGE, START

#: Per layer, the gain of each head.
Gains = dict[int, list[float]]


def scale(gains: Gains) -> Edit:
    """Multiply the output of every head, at all positions."""

    def edit(layer: int, outputs: Tensor, row: int, hidden: Tensor) -> Tensor:
        for h, gain in enumerate(gains.get(layer, [])):
            outputs[h] = outputs[h] * gain
        return outputs

    return edit


def last_outputs(model: Any, inputs: dict[str, Tensor], gains: Gains, layer: int) -> list[list[float]]:
    """Output of every head of a layer at the last position of the one prompt in ``inputs``, before its own gain."""
    seen = {}

    def edit(number: int, outputs: Tensor, row: int, hidden: Tensor) -> Tensor:
        if number == layer:
            seen["outputs"] = outputs[:, -1].tolist()
        return scale(gains)(number, outputs, row, hidden)

    with dense_attention(model, output=edit):
        full_logits(model, inputs)
    return seen["outputs"]


def without_image(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens of the one prompt that are text; not every configuration names those that open and close an image."""
    marks = {IMAGE} | ({START, END} if hasattr(model.config, "vision_start_token_id") else set())
    ids = torch.tensor([[i for i in inputs["input_ids"][0].tolist() if i not in marks]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stands_out(values: list[float], std: str) -> list[bool]:
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - (1 if std == "sample" else 0))
    return [value > mean + math.sqrt(spread) for value in values]


def choose(
    outputs: list[list[float]], text: list[list[float]], drop_outliers: bool = True, std: str = "sample"
) -> list[int]:
    """Steps 1 to 4 of the method: the heads of one layer that are reinforced."""
    vhd = [math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True))) for x, y in zip(outputs, text, strict=True)]
    energy = [sum(b * b for b in y) for y in text]
    if drop_outliers:
        far, strong = stands_out(vhd, std), stands_out(energy, std)
        vhd = [0.0 if far[h] and strong[h] else value for h, value in enumerate(vhd)]
    middle = sorted(vhd)[(len(vhd) - 1) // 2]
    return [h for h, value in enumerate(vhd) if value > middle]


def vhr_gains(
    model: Any,
    inputs: dict[str, Tensor],
    alpha: float,
    layers: list[int],
    *,
    twopass: bool = False,
    scale_text: bool = True,
    drop_outliers: bool = True,
    std: str = "sample",
) -> Gains:
    """Gains of the one prompt in ``inputs``; none at all without an image."""
    gains: Gains = {}
    if not (inputs["input_ids"] == IMAGE).any():
        return gains
    for layer in sorted(layers):
        below = {} if twopass else dict(gains)
        outputs = last_outputs(model, inputs, below, layer)
        text = last_outputs(model, without_image(model, inputs), below if scale_text else {}, layer)
        chosen = choose(outputs, text, drop_outliers, std)
        gains[layer] = [alpha if h in chosen else 1.0 for h in range(len(outputs))]
    return gains


def vhr(rows: list[Gains]) -> Edit:
    """Edit of `dense_attention` that scales every row of a batch by its own gains."""

    def edit(layer: int, outputs: Tensor, row: int, hidden: Tensor) -> Tensor:
        return scale(rows[row])(layer, outputs, row, hidden)

    return edit
