"""Maps the slow way: one forward over prompt and answer with all attention matrices, dense products, loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from tests.reference.attention import dense_attention


def matrices(
    model: Any, inputs: dict[str, Tensor], answer: list[int], edit: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Attention ``[H, N, N]`` of every layer over prompt and answer, with its graph, and logits ``[N, vocabulary]``."""
    seen: dict[int, Tensor] = {}

    def hold(layer: int, weights: Tensor, row: int, hidden: Tensor) -> Tensor:
        seen[layer] = weights if edit is None else edit(weights)
        return seen[layer]

    with torch.enable_grad(), dense_attention(model, hold):
        logits = model(**continued(inputs, answer), use_cache=False).logits[0]
    return [seen[layer] for layer in sorted(seen)], logits


def continued(inputs: dict[str, Tensor], answer: list[int]) -> dict[str, Tensor]:
    """The prompt with the answer behind it."""
    new = torch.tensor([answer], dtype=torch.long)
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new], dim=1)}
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(answer))], dim=1)
    return out


def grad_att(
    model: Any,
    inputs: dict[str, Tensor],
    answer: list[int],
    t: int,
    layer: int,
    edit: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``mean_h A relu(dv/dA)`` ``[N]`` of the row that chooses token t, through the graph of everything."""
    attention, logits = matrices(model, inputs, answer[:t], edit)
    chance = torch.log_softmax(logits[-1].float(), dim=-1)[answer[t]]
    (gradient,) = torch.autograd.grad(chance, attention[layer])
    return torch.stack([a * torch.relu(g) for a, g in zip(attention[layer][:, -1], gradient[:, -1], strict=True)]).mean(
        0
    )


def relevancy(model: Any, inputs: dict[str, Tensor], answer: list[int], last: int) -> list[Tensor]:
    """Last row of R for tokens 0 to ``last``: matrices of the first token, later rows below them."""
    stored: list[Tensor] = []
    rows = []
    for t in range(last + 1):
        attention, logits = matrices(model, inputs, answer[:t])
        gradients = torch.autograd.grad(logits[-1, answer[t]], attention)
        size = len(logits)
        relevance = torch.eye(size)
        for layer, (a, g) in enumerate(zip(attention, gradients, strict=True)):
            own = torch.relu(a * g).mean(dim=0).detach()
            if t:
                grown = torch.zeros(size, size)
                grown[:-1, :-1] = stored[layer]
                grown[-1] = own[-1]
                own = grown
                stored[layer] = own
            else:
                stored.append(own)
            relevance = relevance + own @ relevance
        rows.append(relevance[-1])
    return rows


def rollout(attention: list[Tensor]) -> Tensor:
    """``[N, N]``."""
    size = attention[0].shape[-1]
    out = torch.eye(size)
    for layer in attention:
        step = layer.detach().mean(dim=0) + torch.eye(size)
        out = (step / step.sum(dim=1, keepdim=True)) @ out
    return out


def flow(attention: list[Tensor], regularise: str) -> Tensor:
    """``[N, N]``."""
    heads, size, _ = attention[0].shape
    factor = torch.tensor([1 - (size - j - 1) / size for j in range(size)])
    total = torch.zeros(size, size)
    for number, layer in enumerate(attention):
        weighted = torch.zeros(size, size)
        for head in range(heads):
            weight = sum(float(layer[head, i].detach().max()) for i in range(size)) / size
            weighted += layer[head].detach() * weight / heads
        total = (torch.eye(size) + weighted) @ (torch.eye(size) + total) if number else weighted
        if regularise == "layer":
            total = total * factor
    return total * factor if regularise == "final" else total


def rank_gaussian(image: np.ndarray) -> np.ndarray:
    """3 x 3, cell by cell."""
    padded = np.pad(image, 1, mode="reflect")
    out = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            window = sorted(padded[i : i + 3, j : j + 3].flatten())
            mean = sum(window) / 9
            if mean <= 0:
                continue
            sigma = (sum((x - mean) ** 2 for x in window) / 9) ** 0.5 / mean
            if sigma == 0:
                out[i, j] = window[4]
                continue
            kernel = [np.exp(-((rank - 4) ** 2) / (2 * sigma**2)) for rank in range(9)]
            out[i, j] = sum(x * k for x, k in zip(window, kernel, strict=True)) / sum(kernel)
    return out


def tam(
    logits: np.ndarray, visual: list[int], text: list[int], words: list[int], num_prompt: int, t: int, official: bool
) -> np.ndarray:
    """
    Map of token t of the answer before the filter; ``logits [N, vocabulary]``.

    ``text``: position of every text token of the prompt that counts, then of those that choose the answer's tokens.
    """
    ids = list(words)
    ids[0] = int(logits[text[0]].argmax())
    if official:
        ids[num_prompt] = words[-1]  # the caller puts the last token of the prompt there
    words = words[:-1] if official else words
    k = num_prompt + t
    maps = [np.array([max(logits[v, c], 0) for v in visual]) for c in ids[: k + 1]]
    scores = [max(logits[p, ids[k]], 0) for p in text]
    found = maps[k]
    earlier = [i for i in range(k) if words[i] != words[k]]
    if earlier:
        total = sum(scores[i] for i in earlier) + 1e-8
        disturbing = sum(maps[i] * scores[i] / total for i in earlier)
        scale = minimize_scalar(lambda x: float(((found - disturbing * x) ** 2).sum())).x
        found = np.clip(found - disturbing * scale, 0, None)
    together = np.concatenate([found, scores[: max(k, num_prompt)]])
    return (found - together.min()) / (together.max() - together.min())
