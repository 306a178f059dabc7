"""ControlMLLM the slow way: every step a forward of the whole model with full matrices, updates by formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmmhooks.prompting import build_inputs


def attention_and_logits(
    model: Any, processor: Any, image: Any, prompt: str, offset: Tensor
) -> tuple[list[Tensor], Tensor, slice]:
    """Attention ``[H, N, N]`` of all layers under an offset on the image's embeddings, logits, the image's place."""
    inputs = build_inputs(processor, [image], prompt)
    here = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    text = model.model.language_model

    def shift(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = kwargs["inputs_embeds"].clone()
        embeds[0, here] = embeds[0, here] + offset.to(embeds)
        return args, {**kwargs, "inputs_embeds": embeds}

    handle = text.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        out = model(**inputs, output_attentions=True, use_cache=False)
    finally:
        handle.remove()
    return [layer[0] for layer in out.attentions], out.logits[0], slice(int(here[0]), int(here[-1]) + 1)


def loss(
    attentions: list[Tensor], span: slice, weights: Tensor, layers: Any, rows: str, alpha: float, eps: float
) -> Any:
    """The loss, as sums over a mean map."""
    mean = torch.stack([attentions[layer] for layer in layers]).mean(dim=0)
    chosen = mean[:, -1:] if rows == "last" else mean[:, span.stop :]
    on_image = chosen.mean(dim=1).mean(dim=0)[span]
    inside = total = torch.zeros(())
    for cell in range(len(weights)):
        inside = inside + on_image[cell] * weights[cell]
        total = total + on_image[cell]
    return alpha * (1 - inside / (total + eps)) ** 2


def plus_plus(loss_of: Any, offset: Tensor, steps: int, lr: float) -> Tensor:
    """Updates of ControlMLLM++: Adam by its formula."""
    mean, square = torch.zeros_like(offset), torch.zeros_like(offset)
    for t in range(1, steps + 1):
        offset = offset.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(offset), [offset])
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        offset = offset - lr * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-3)
    return offset.detach()


def first_version(loss_of: Any, prompt: Tensor, steps: int, lr: float, beta: float, stop: float | None) -> Tensor:
    """Updates of v1 with embeddings that are written to in place: everything that is ever added stays."""
    written = torch.zeros_like(prompt)
    prompt = prompt.requires_grad_()
    history, losses = prompt, []
    for _ in range(steps):
        current = beta * prompt + (1 - beta) * history
        applied = written + current
        value = loss_of(applied)
        written = applied.detach()
        losses.append(float(value.detach()))
        if stop is not None and len(losses) > 2 and abs((losses[-1] - losses[0]) / losses[0]) * 100 > stop:
            break
        if stop is not None and len(losses) > 1 and losses[-1] > losses[-2]:
            break
        history = current.detach()
        (gradient,) = torch.autograd.grad(value, [prompt])
        prompt = (prompt - lr * gradient).detach().requires_grad_()
    return (written + beta * prompt + (1 - beta) * history).detach()


def sampled(picture: np.ndarray, side: int) -> np.ndarray:
    """Nearest pixels of a picture brought to 224, its middle, brought to ``side``, one by one."""
    height, width = picture.shape
    short = min(height, width)
    wide, high = math.floor(224 * width / short), math.floor(224 * height / short)
    left, top = round((wide - 224) / 2), round((high - 224) / 2)
    out = np.zeros((side, side), dtype=picture.dtype)
    for row in range(side):
        for column in range(side):
            y, x = math.floor((row + 0.5) * 224 / side) + top, math.floor((column + 0.5) * 224 / side) + left
            out[row, column] = picture[math.floor((y + 0.5) * height / high), math.floor((x + 0.5) * width / wide)]
    return out
