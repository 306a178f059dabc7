"""
Methods that look again the slow way: full forwards with eager attention or a full graph, and Python loops.

Nothing here is shared with the fast path but the processor's inputs: no cache, no hooks, no engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmmhooks.prompting import build_inputs


def visual_positions(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Positions of the image's tokens in a prompt."""
    config = model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    return (inputs["input_ids"][0] == token).nonzero()[:, 0]


def attention_rows(model: Any, processor: Any, image: Any, prompt: str, layer: int, steps: int) -> Tensor:
    """``[T, H, n]`` of an eager model: a full forward per token of its greedy answer."""
    inputs = build_inputs(processor, [image], prompt)
    positions = visual_positions(model, inputs)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    rows = []
    for _ in range(steps):
        with torch.no_grad():
            out = model(**inputs, output_attentions=True, use_cache=False)
        rows.append(out.attentions[layer][0, :, -1, positions])
        token = int(out.logits[0, -1].argmax())
        if token in ends:
            break
        new = torch.tensor([[token]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.full_like(new, value)], dim=1)
    return torch.stack(rows)


def attention_gradient(model: Any, processor: Any, image: Any, prompt: str, layer: int) -> tuple[Tensor, Tensor]:
    """Attention of the last position ``[H, n]`` and the derivative by it, through the graph of the whole prompt."""
    inputs = build_inputs(processor, [image], prompt)
    positions = visual_positions(model, inputs)
    out = model(**inputs, output_attentions=True, use_cache=False)
    chance = out.logits[0, -1].log_softmax(dim=-1).max()
    [gradient] = torch.autograd.grad(chance, out.attentions[layer])
    return out.attentions[layer].detach()[0, :, -1, positions], gradient[0, :, -1, positions]


def pixel_gradient(model: Any, processor: Any, image: Any, prompt: str) -> Tensor:
    """The derivative by the pixels, as the encoder takes them."""
    inputs = build_inputs(processor, [image], prompt)
    inputs["pixel_values"] = inputs["pixel_values"].requires_grad_()
    chance = model(**inputs, use_cache=False).logits[0, -1].log_softmax(dim=-1).max()
    [gradient] = torch.autograd.grad(chance, inputs["pixel_values"])
    return gradient


def crop_box(
    importance: Sequence[Sequence[float]], size: tuple[int, int], base: float
) -> tuple[float, float, float, float]:
    """ViCrop's window search, window by window and cell by cell."""
    rows, columns = len(importance), len(importance[0])
    width, height = size[0] / columns, size[1] / rows
    candidates = []
    for ratio in (1, 1.2, 1.4, 1.6, 1.8, 2):
        # A window is a cell at least, where the authors divide by zero.
        nx, ny = max(min(int(base * ratio / width), columns), 1), max(min(int(base * ratio / height), rows), 1)
        if nx == columns and ny == rows:
            if ratio == 1:
                return 0, 0, size[0], size[1]
            continue
        sums = {}
        best = None
        for x in range(columns - nx + 1):
            for y in range(rows - ny + 1):
                sums[x, y] = math.fsum(importance[y + j][x + i] for j in range(ny) for i in range(nx))
                if best is None or sums[x, y] > sums[best]:
                    best = x, y
        x, y = best
        beside = [sums[p] for p in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if p in sums]
        candidates.append(((sums[best] - sum(beside) / len(beside)) / (nx * ny), ratio, x, y, nx, ny))
    sharpest = candidates[0]
    for candidate in candidates[1:]:
        if candidate[0] > sharpest[0]:
            sharpest = candidate
    _, ratio, x, y, nx, ny = sharpest
    side = base * ratio
    centre = [int(x * width + width * nx / 2), int(y * height + height * ny / 2)]
    box: list[float] = []
    for axis in (0, 1):
        if centre[axis] < side // 2:
            centre[axis] = side // 2
        if centre[axis] > size[axis] - side // 2:
            centre[axis] = size[axis] - side // 2
        box.append(max(0, centre[axis] - side // 2))
    for axis in (0, 1):
        box.append(min(size[axis], centre[axis] + side // 2))
    return box[0], box[1], box[2], box[3]


def mean_within_image(rows: Tensor) -> list[float]:
    """Each row of each head divided by its sum; mean over heads, then steps."""
    steps = []
    for step in rows.double().tolist():
        heads = [[value / sum(head) for value in head] for head in step]
        steps.append([sum(cell) / len(heads) for cell in zip(*heads, strict=True)])
    return [sum(cell) / len(steps) for cell in zip(*steps, strict=True)]


def soft_mask(grid: Sequence[Sequence[float]], contrast: float, kernel: int) -> list[list[float]]:
    """Attention prompting's mask in plain Python."""
    rows, columns = len(grid), len(grid[0])
    flat = [value for row in grid for value in row]
    low, high = min(flat), max(flat)
    shares = [[(value - low) / (high - low) for value in row] for row in grid]
    flat = [value for row in shares for value in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / (len(flat) - 1))
    raised = [[1 / (1 + math.exp(-contrast * (value - mean) / deviation)) for value in row] for row in shares]
    reach = kernel // 2
    out = []
    for y in range(rows):
        line = []
        for x in range(columns):
            near = [
                raised[min(max(y + j, 0), rows - 1)][min(max(x + i, 0), columns - 1)]
                for j in range(-reach, reach + 1)
                for i in range(-reach, reach + 1)
            ]
            line.append(sum(near) / kernel**2)
        out.append(line)
    return out


def warp_positions(profile: Sequence[float], length: int) -> list[float]:
    """Where the pixels of a warped axis come from: walks along the edges for each of them."""
    total = sum(profile)
    edges, gone = [0.0], 0.0
    for value in profile:
        gone += value
        edges.append(length * gone / total)
    edges[-1] = length
    places = []
    for pixel in range(length):
        place = next(i for i in range(len(profile)) if edges[i] <= pixel <= edges[i + 1] and edges[i] < edges[i + 1])
        # The last piece that begins there, where several do.
        while place + 1 < len(profile) and edges[place + 1] <= pixel:
            place += 1
        places.append(place + (pixel - edges[place]) / (edges[place + 1] - edges[place]))
    return places


def bilinear(pixels: np.ndarray, across: Sequence[float], down: Sequence[float]) -> np.ndarray:
    """Float64 ``[h, w, 3]``: four neighbours per pixel, the border repeated."""
    height, width = pixels.shape[:2]
    out = np.zeros((len(down), len(across), 3))
    for j, y in enumerate(down):
        for i, x in enumerate(across):
            left, top = math.floor(x), math.floor(y)
            for dy, wy in ((0, 1 - (y - top)), (1, y - top)):
                for dx, wx in ((0, 1 - (x - left)), (1, x - left)):
                    here = pixels[min(top + dy, height - 1), min(left + dx, width - 1)]
                    out[j, i] += wy * wx * here.astype(np.float64)
    return out
