"""
The vision tower the slow way: every crop alone, one layer after the other, with the model's own submodules.

Attention is a full matrix per head; tokens that leave are taken out of a Python list. A rule decides after the
attention and after the output of every layer who stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Token:
    """A token of one crop: its slot in the full sequence (class token 0 where there is one), its state, its size."""

    slot: int
    state: Tensor
    size: int = 1


@dataclass
class Seen:
    """What a layer's attention looked at: weights ``[H, t, t]``, logits before the softmax, keys and values."""

    weights: Tensor
    logits: Tensor
    key: Tensor
    value: Tensor


#: (layer, "attention" or "layer", tokens, what attention saw) -> tokens that stay, in order
Rule = Callable[[int, str, list[Token], Seen], list[Token]]


@torch.no_grad()
def naive_crop(tower: Any, pixels: Tensor, rule: Rule, last: int, weigh: bool) -> tuple[dict[int, Tensor], Tensor]:
    """
    One crop through the layers 0 to ``last``.

    Parameters
    ----------
    tower
        A CLIP or SigLIP vision model.
    pixels
        ``[3, height, width]``.
    weigh
        Add the logarithm of sizes to attention logits.

    Returns
    -------
    tuple
        States of the tokens that are left by slot; states ``[slots, C]`` of all, those that left as they were then.
    """
    hidden = tower.embeddings(pixels[None])
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    tokens = [Token(slot, state) for slot, state in enumerate(hidden[0])]
    slots = {token.slot: token.state for token in tokens}

    def thin(layer: int, place: str, seen: Seen) -> None:
        nonlocal tokens
        for token in tokens:
            slots[token.slot] = token.state
        tokens = rule(layer, place, tokens, seen)

    for number, layer in enumerate(tower.encoder.layers[: last + 1]):
        attention = layer.self_attn
        states = torch.stack([token.state for token in tokens])
        normed = layer.layer_norm1(states)
        heads, width = attention.num_heads, attention.head_dim
        query, key, value = (
            projection(normed).view(-1, heads, width).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = torch.zeros(heads, len(tokens), len(tokens))
        for head in range(heads):
            logits[head] = query[head] @ key[head].T / math.sqrt(width)
            if weigh:
                logits[head] += torch.tensor([math.log(token.size) for token in tokens])
        weights = logits.softmax(dim=-1)
        mixed = torch.cat([weights[head] @ value[head] for head in range(heads)], dim=-1)
        for token, state in zip(tokens, states + attention.out_proj(mixed), strict=True):
            token.state = state
        seen = Seen(weights, logits, key, value)
        thin(number, "attention", seen)
        states = torch.stack([token.state for token in tokens])
        for token, state in zip(tokens, states + layer.mlp(layer.layer_norm2(states)), strict=True):
            token.state = state
        thin(number, "layer", seen)
    survivors = {token.slot: token.state for token in tokens}
    slots.update(survivors)
    return survivors, torch.stack([slots[slot] for slot in sorted(slots)])


@contextmanager
def naive_tower(model: Any, make_rule: Callable[[], Rule], last: int, weigh: bool) -> Iterator[list[list[set[int]]]]:
    """
    Replace what the projector takes from the tower by what `naive_crop` makes of every crop.

    Yields a list that gets, for every encoder call, the slots of the survivors per crop. ``make_rule`` is called once
    per crop: rules may remember.
    """
    tower = model.model.vision_tower
    kept: list[list[set[int]]] = []

    def replace(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        crops = [naive_crop(tower, crop, make_rule(), last, weigh) for crop in pixels]
        kept.append([set(survivors) for survivors, _ in crops])
        states = list(output.hidden_states)
        states[last + 1] = torch.stack([slots for _, slots in crops])
        output["hidden_states"] = tuple(states)
        return output

    hook = tower.register_forward_hook(replace, with_kwargs=True)
    try:
        yield kept
    finally:
        hook.remove()


def tome(schedule: list[int], has_cls: bool) -> Rule:
    """Bipartite soft matching by cosine of head-mean keys; even positions give, odd ones take."""

    def rule(layer: int, place: str, tokens: list[Token], seen: Seen) -> list[Token]:
        r = min(schedule[layer], (len(tokens) - has_cls) // 2)
        if place != "attention" or r <= 0:
            return tokens
        metric = [seen.key[:, i].mean(dim=0) for i in range(len(tokens))]
        given, taking = range(0, len(tokens), 2), range(1, len(tokens), 2)
        partner, best = {}, {}
        for a in given:
            cosines = {b: float(metric[a] @ metric[b] / metric[a].norm() / metric[b].norm()) for b in taking}
            partner[a] = max(cosines, key=lambda b: cosines[b])
            best[a] = -math.inf if has_cls and a == 0 else cosines[partner[a]]
        order = sorted(given, key=lambda a: -best[a])
        sources, rest = order[:r], order[r:]
        total = {b: tokens[b].state * tokens[b].size for b in taking}
        for a in sources:
            total[partner[a]] = total[partner[a]] + tokens[a].state * tokens[a].size
        out = [tokens[a] for a in (sorted(rest) if has_cls else rest)]
        for b in taking:
            members = [tokens[b], *(tokens[a] for a in sources if partner[a] == b)]
            size = sum(token.size for token in members)
            out.append(Token(min(token.slot for token in members), total[b] / size, size))
        return out

    return rule


def evit(num_kept: dict[int, int], fuse: bool, has_cls: bool) -> Rule:
    """Class attention, head mean; kept patches by layer; the others' weighted sum, at the place of the best of them."""

    def rule(layer: int, place: str, tokens: list[Token], seen: Seen) -> list[Token]:
        first = int(has_cls)
        if place != "attention" or layer not in num_kept or num_kept[layer] >= len(tokens) - first:
            return tokens
        scores = {}
        for j in range(first, len(tokens)):
            rows = [0] if has_cls else range(len(tokens))
            received = [float(seen.weights[h, i, j]) for h in range(len(seen.weights)) for i in rows]
            scores[j] = sum(received) / len(received)
        order = sorted(scores, key=lambda j: -scores[j])
        kept, dropped = order[: num_kept[layer]], order[num_kept[layer] :]
        out = [*tokens[:first], *(tokens[j] for j in kept)]
        if fuse:
            extra = sum(scores[j] * tokens[j].state for j in dropped)
            assert isinstance(extra, Tensor)
            out.append(Token(tokens[dropped[0]].slot, extra))
        return out

    return rule


def ats(blocks: list[int], num_levels: int, min_tokens: int, has_cls: bool) -> Rule:
    """Inverse-transform sampling of class attention times the norm of the value."""

    def rule(layer: int, place: str, tokens: list[Token], seen: Seen) -> list[Token]:
        if place != "attention" or layer not in blocks:
            return tokens
        first, heads = int(has_cls), len(seen.logits)
        scores = []
        for j in range(first, len(tokens)):
            if has_cls:
                attention = 0.0
                for h in range(heads):
                    raised = (seen.logits[h, 0] - seen.logits[h, 0].max()).exp()
                    attention += float((raised[j] + 1e-6 / len(tokens)) / (raised.sum() + 1e-6))
            else:
                attention = float(seen.weights[:, :, j].mean(dim=1).sum())
            scores.append(attention * float(torch.cat([seen.value[h, j] for h in range(heads)]).norm()))
        shares = [score / sum(scores) for score in scores]
        order = sorted(range(len(shares)), key=lambda j: shares[j])
        running, cumulative = 0.0, []
        for j in order:
            running += shares[j]
            cumulative.append(running)
        low, high = cumulative[0], cumulative[-1]
        cumulative = [(c - low) / (high - low) for c in cumulative]
        start = min(c for c in cumulative if c > 0)
        met = set()
        for k in range(num_levels):
            level = start + (1 - start) * k / (num_levels - 1)
            met.add(order[min(range(len(order)), key=lambda i: abs(level - cumulative[i]))])
        for j in reversed(order):
            if len(met) < min_tokens:
                met.add(j)
        return [*tokens[:first], *(tokens[first + j] for j in sorted(met))]

    return rule


def flowcut(target: int, last: int, momentum: float) -> Rule:
    """Accumulated scores; prunes every second layer by the entropy of class attention; a class token is there."""
    accumulated: dict[int, float] = {}

    def rule(layer: int, place: str, tokens: list[Token], seen: Seen) -> list[Token]:
        count = len(tokens) - 1
        if place != "layer" or layer >= last or count <= target:
            return tokens
        heads = len(seen.weights)
        attention = [float(seen.weights[:, 0, j].mean()) for j in range(1, len(tokens))]
        similarity = [0.0] * count
        for h in range(heads):
            softmax = torch.softmax(seen.value[h] @ seen.value[h, 0], dim=0)
            for j in range(count):
                similarity[j] += float(softmax[j + 1]) / heads
        for j in range(count):
            size = float(seen.value[:, j + 1].mean(dim=0).abs().sum())
            score = (attention[j] / sum(attention) + similarity[j] / sum(similarity)) * size
            slot = tokens[j + 1].slot
            accumulated[slot] = momentum * accumulated[slot] + (1 - momentum) * score if slot in accumulated else score
        remaining = last - layer - 1
        if remaining % 2:
            return tokens
        left = target
        if remaining:
            shares = [a / sum(attention) for a in attention]
            entropy = -sum(p * math.log(p) for p in shares)
            step = round((count - target) / math.sqrt(remaining) * (1 - (entropy / math.log(count)) ** 2))
            left = max(count - step, target)
        order = sorted(tokens[1:], key=lambda token: -accumulated[token.slot])
        stay = {token.slot for token in order[:left]}
        return [tokens[0], *(token for token in tokens[1:] if token.slot in stay)]

    return rule


def clusters_of(metric: list[Tensor], num_keep: int) -> list[list[int]]:
    """Members of the tokens that are left, in the order of their first; one pair after the other in every round."""
    clusters = [[i] for i in range(len(metric))]
    while len(clusters) > num_keep:
        keys = [torch.stack([metric[i] for i in members]).mean(dim=0) for members in clusters]
        pairs = []
        for a in range(0, len(clusters), 2):
            cosines = {b: float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in range(1, len(clusters), 2)}
            b = max(cosines, key=lambda b: cosines[b])
            pairs.append((-cosines[b], a, b))
        chosen = sorted(pairs)[: min(len(clusters) - num_keep, len(clusters) // 2)]
        for _, a, b in chosen:
            clusters[b] = clusters[b] + clusters[a]
        gone = {a for _, a, _ in chosen}
        clusters = sorted((members for i, members in enumerate(clusters) if i not in gone), key=min)
    return clusters
