"""
Compressed keys and values the slow way: one row of a batch without padding, one head and one entry at a time.

One forward without cache over prompt and answer: prompt rows attend as ever, rows of the answer to a list of kept pairs
per head, followed by the answer so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.reference.attention import full_logits

Pair = tuple[Tensor, Tensor]
#: (layer, attention [H, P, P] of the prompt, its keys [Hkv, P, d], its values) -> kept pairs of every key head
Press = Callable[[int, Tensor, Tensor, Tensor], list[list[Pair]]]


@contextmanager
def pressed_attention(model: Any, prompt: int, press: Press | None, seen: dict[int, Tensor]) -> Iterator[None]:
    """Run the decoder on explicit attention; ``seen`` takes that of the prompt per layer."""
    text = model.model.language_model

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        (q,), (k,), (v,) = q, k, v
        groups = len(q) // len(k)
        out = torch.empty(len(q), q.shape[1], v.shape[2])
        weights = torch.zeros(len(q), q.shape[1], q.shape[1])
        for head in range(len(q)):
            for i in range(q.shape[1]):
                scores = k[head // groups, : i + 1] @ q[head, i] * kwargs["scaling"]
                weights[head, i, : i + 1] = torch.softmax(scores, dim=0)
            out[head] = weights[head] @ v[head // groups]
        layer = module.layer_idx
        seen[layer] = weights[:, :prompt, :prompt]
        if press is not None and q.shape[1] > prompt:
            lists = press(layer, seen[layer], k[:, :prompt], v[:, :prompt])
            for head in range(len(q)):
                own = head // groups
                for i in range(prompt, q.shape[1]):
                    pairs = lists[own] + [(k[own, j], v[own, j]) for j in range(prompt, i + 1)]
                    scores = torch.stack([key @ q[head, i] for key, _ in pairs]) * kwargs["scaling"]
                    shares = torch.softmax(scores, dim=0)
                    out[head, i] = sum(share * value for share, (_, value) in zip(shares, pairs, strict=True))
        return out.transpose(0, 1)[None].contiguous(), None

    AttentionInterface.register("test_pressed", attend)
    AttentionMaskInterface.register("test_pressed", eager_mask)
    before = text.config._attn_implementation
    text.config._attn_implementation_internal = "test_pressed"
    try:
        yield
    finally:
        text.config._attn_implementation_internal = before


def prompt_attention(model: Any, one: dict[str, Any]) -> dict[int, Tensor]:
    """Attention ``[H, P, P]`` of every layer of a prompt that stands alone."""
    seen: dict[int, Tensor] = {}
    with pressed_attention(model, one["input_ids"].shape[1], None, seen):
        full_logits(model, one)
    return seen


def step_logits(model: Any, one: dict[str, Any], press: Press, answer: Tensor) -> Tensor:
    """Logits ``[t, vocabulary]`` that chose the ``answer [t]`` after a prompt that stands alone."""
    prompt = one["input_ids"].shape[1]
    with pressed_attention(model, prompt, press, {}):
        return full_logits(model, one, answer[None, :-1])[0, prompt - 1 :]


def keep_each(chosen: list[list[int]], keys: Tensor, values: Tensor) -> list[list[Pair]]:
    """Nothing is merged: the pairs of every head at their indices."""
    return [[(keys[h, j], values[h, j]) for j in stay] for h, stay in enumerate(chosen)]


def column_sums(weights: Tensor, num_heads: int, rows: list[int]) -> list[list[float]]:
    """Per key head and entry, attention summed over the rows and over the heads that share the key."""
    groups = len(weights) // num_heads
    return [
        [
            sum(float(weights[h, i, j]) for h in range(own * groups, (own + 1) * groups) for i in rows)
            for j in range(weights.shape[2])
        ]
        for own in range(num_heads)
    ]


def look_m(visual: list[bool], hh_ratio: float, recent_ratio: float, merge: str, text_prior: bool) -> Press:
    """Column sums over all rows; text first, or the first four; then every evicted pair finds its nearest key."""
    n = len(visual)
    best, recent = int(n * hh_ratio), int(n * recent_ratio)

    def press(layer: int, weights: Tensor, keys: Tensor, values: Tensor) -> list[list[Pair]]:
        if best + recent >= n:
            return keep_each([list(range(n))] * len(keys), keys, values)
        stays: list[list[int]] = []
        for score in column_sums(weights, len(keys), list(range(n))):
            for j in range(n):
                if text_prior:
                    score[j] -= 65516 * visual[j]
                elif j < 4:
                    score[j] = math.inf
            ranked = sorted(range(n - recent), key=lambda j: -score[j])
            stay = set(ranked[:best]) | set(range(n - recent, n))
            if text_prior:
                stay |= {j for j in range(n) if not visual[j]}
            stays.append(sorted(stay))
        return merged(stays, keys, values, merge)

    return press


def merged(stays: list[list[int]], keys: Tensor, values: Tensor, merge: str) -> list[list[Pair]]:
    """Fold evicted pairs into the kept one whose key points most nearly the same way."""
    if merge == "none":
        return keep_each(stays, keys, values)
    gone = [[j for j in range(keys.shape[1]) if j not in stay] for stay in stays]
    found: list[list[tuple[float, int]]] = []
    for h, stay in enumerate(stays):
        similar = [[float(torch.cosine_similarity(keys[h, e], keys[h, j], dim=0)) for j in stay] for e in gone[h]]
        found.append([(max(row), row.index(max(row))) for row in similar])
    out = []
    ordinals = range(len(gone[0]))
    overall = sum(s for row in found for s, _ in row) / max(1, sum(len(row) for row in found))
    for h, stay in enumerate(stays):
        pairs = []
        for place, j in enumerate(stay):
            new_key, new_value, num = keys[h, j].clone(), values[h, j].clone(), 1
            for o in ordinals:
                similarity, pivot = found[h][o]
                mean = sum(row[o][0] for row in found) / len(found)
                if pivot != place or (merge == "weighted" and mean < overall):
                    continue
                key, value = keys[h, gone[h][o]], values[h, gone[h][o]]
                if merge == "pivot":
                    key, value = (key + keys[h, j]) / 2, (value + values[h, j]) / 2
                if merge == "weighted":
                    key, value = similarity * key, similarity * value
                new_key, new_value, num = new_key + key, new_value + value, num + 1
            pairs.append((new_key / num, new_value / num))
        out.append(pairs)
    return out


def vl_cache_sizes(
    visual: list[bool], seen: dict[int, Tensor], alpha: float, p: float, min_keep: float, n_min: int
) -> list[int]:
    """Entries of every layer: its share of the budget follows how many weights are not near zero."""
    n = len(visual)
    densities = []
    for layer in sorted(seen):
        zeros = total = 0
        for i in question_rows(visual, n_min):
            for row in seen[layer][:, i]:
                largest = max(float(x) for x in row[: i + 1])
                zeros += sum(float(row[j]) < p * largest for j in range(i + 1))
                total += i + 1
        densities.append(1 - zeros / total)
    shares = [d / sum(densities) * alpha * len(seen) for d in densities]
    return [math.ceil(min(1.0, max(min_keep, share)) * n - 1e-9) for share in shares]


def question_rows(visual: list[bool], n_min: int) -> list[int]:
    """Rows after the last image, and the last ``n_min``."""
    last = max(j for j in range(len(visual)) if visual[j])
    return [i for i in range(len(visual)) if i > last or i >= len(visual) - n_min]


def vl_cache(visual: list[bool], sizes: list[int], recent_ratio: float, n_min: int) -> Press:
    """Column sums over the question's rows; the recent window comes first."""
    n = len(visual)

    def press(layer: int, weights: Tensor, keys: Tensor, values: Tensor) -> list[list[Pair]]:
        k = sizes[layer]
        recent = int(recent_ratio * k + 1e-9)
        chosen = []
        for score in column_sums(weights, len(keys), question_rows(visual, n_min)):
            ranked = sorted(range(n - recent), key=lambda j: -score[j])
            chosen.append(sorted([*ranked[: k - recent], *range(n - recent, n)]))
        return keep_each(chosen, keys, values)

    return press
