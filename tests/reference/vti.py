"""Visual and textual intervention the slow way: one vector at a time, singular vectors from NumPy."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def steered(x: Tensor, d: Tensor, strength: float) -> Tensor:
    """x' = ||x|| normalize(normalize(x) + strength normalize(d)) of one vector ``[D]``."""
    length = float(sum(float(v) ** 2 for v in x)) ** 0.5
    towards = float(sum(float(v) ** 2 for v in d)) ** 0.5
    mixed = [float(a) / length + strength * float(b) / towards for a, b in zip(x, d, strict=True)]
    norm = sum(v * v for v in mixed) ** 0.5
    return torch.tensor([length * v / norm for v in mixed])


@contextmanager
def steered_mlps(decoder: list[Any], tower: list[Any], textual: Tensor, visual: Tensor, a: float, b: float):  # type: ignore[no-untyped-def]
    """Run a model with the outputs of these MLP modules replaced, vector by vector; ``a``: decoder, ``b``: tower."""

    def text_hook(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            return torch.stack([torch.stack([steered(x, textual[layer], a) for x in row]) for row in output])

        return hook

    def vision_hook(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            if output.dim() == 3 and output.shape[1] == visual.shape[1]:
                return torch.stack(
                    [torch.stack([steered(x, visual[layer, t], b) for t, x in enumerate(crop)]) for crop in output]
                )
            mean = sum(visual[layer, t] for t in range(visual.shape[1])) / visual.shape[1]
            flat = output.reshape(-1, output.shape[-1])
            return torch.stack([steered(x, mean, b) for x in flat]).view_as(output)

        return hook

    hooks = [mlp.register_forward_hook(text_hook(i)) for i, mlp in enumerate(decoder)]
    hooks += [mlp.register_forward_hook(vision_hook(i)) for i, mlp in enumerate(tower)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shift(rows: np.ndarray) -> np.ndarray:
    """Mean of ``[n, F]`` plus its first principal component, signed by the largest entry of the left vector."""
    mean = rows.mean(axis=0)
    u, _, vt = np.linalg.svd(rows - mean, full_matrices=False)
    largest = max(range(len(rows)), key=lambda i: abs(u[i, 0]))
    return mean + np.sign(u[largest, 0]) * vt[0]


def visual(differences: np.ndarray, released: bool) -> np.ndarray:
    """``[n, L + 1, T, D]`` to ``[L, T, D]``; groups are tokens, or the pieces an unpermuted reshape makes of them."""
    _, layers, tokens, width = differences.shape
    out = np.zeros((layers, tokens, width))
    size = layers * width
    for group in range(tokens):
        places = []
        for k in range(size):
            if released:
                flat = group * size + k
                places.append((flat // (tokens * width), flat // width % tokens, flat % width))
            else:
                places.append((k // width, group, k % width))
        found = shift(np.array([[one[place] for place in places] for one in differences]))
        for place, value in zip(places, found, strict=True):
            out[place] = value
    return out[1:]
