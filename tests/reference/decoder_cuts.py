"""
Reduction inside the decoder, token by token and number by number, straight from the formulas.

Every function returns what `tests.reference.reduction.reduced_logits` takes: by layer, who stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference.reduction import Choose, Token, best, keep_only

__all__ = [
    "dart",
    "density_peaks",
    "exit_at",
    "fitprune",
    "gated",
    "layer_attention",
    "patient",
    "pyramiddrop",
    "rater_numbers",
    "sparsevlm",
    "v2drop",
]


def layer_attention(model: Any, number: int, alive: Sequence[Token]) -> Tensor:
    """``[H, N, N]`` attention that a layer of a model with eager attention would compute on these tokens."""
    text = model.model.language_model
    seen: list[Tensor] = []
    hook = text.layers[number].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1][0]))
    hidden = torch.stack([token.state for token in alive])[None]
    positions = torch.stack([token.position for token in alive], dim=-1)
    positions = positions[:, None] if positions.ndim == 2 else positions[None]
    mask = torch.full((len(alive), len(alive)), torch.finfo(torch.float32).min).triu(1)[None, None]
    try:
        angles = text.rotary_emb(hidden, positions)
        text.layers[number](hidden, attention_mask=mask, position_embeddings=angles, past_key_values=None)
    finally:
        hook.remove()
    return seen[0]


def pyramiddrop(model: Any, visual: list[int], ratios: Mapping[int, float]) -> dict[int, Choose]:
    """Of the tokens numbered ``visual``, a share of the original ones is left from every layer on."""

    def at(layer: int) -> Choose:
        def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
            weights = layer_attention(model, layer, alive)
            place = {token.number: i for i, token in enumerate(alive)}
            left = [n for n in visual if n in place]
            last = place[prompt - 1]
            scores = {n: float(sum(head[last, place[n]] for head in weights)) / len(weights) for n in left}
            return keep_only(set(visual), best(scores, int(len(visual) * ratios[layer])))(alive, None, prompt)

        return choose

    return {layer: at(layer) for layer in ratios}


def v2drop(
    visual: list[int], ratios: Mapping[int, float], distance: Callable[[Tensor, Tensor], Tensor]
) -> dict[int, Choose]:
    """Before every layer given, the tokens at hand that the layer before moved farthest."""
    before: dict[int, Tensor] = {}

    def at(layer: int) -> Choose:
        def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
            if layer in ratios:
                scores = {t.number: float(distance(before[t.number], t.state)) for t in alive if t.number in visual}
                stay = best(scores, max(1, int(len(scores) * ratios[layer])))
                alive = keep_only(set(visual), stay)(alive, None, prompt)
            before.clear()
            before.update({token.number: token.state for token in alive})
            return alive

        return choose

    return {layer: at(layer) for layer in range(max(ratios) + 1)}


def dart(
    norm: Any,
    keys: Tensor,
    visual: list[int],
    num_keep: int,
    pivots: int,
    text_pivots: int,
    order: Sequence[int] | None,
) -> Choose:
    """
    Visual pivots, and for every pivot in turn the free tokens least like it.

    Parameters
    ----------
    norm
        The decoder's last norm.
    keys
        ``[H, N, d]`` of the layer before, of the prompt.
    """

    def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
        strength = {n: float(keys[:, n].abs().sum()) for n in range(prompt)}
        text = list(range(max(visual) + 1, prompt))
        by_norm = lambda numbers: sorted(numbers, key=lambda n: (-strength[n], n))  # noqa: E731
        first = by_norm(visual)[:pivots]
        turns = first + by_norm(text)[:text_pivots]
        if order is not None:
            turns = [turns[i] for i in order]
        states = {token.number: norm(token.state) for token in alive}
        free = [n for n in visual if n not in first]
        kept = list(first)
        for pivot in turns:
            a = states[pivot]
            likeness = {n: float(a @ states[n] / (a.norm() * states[n].norm())) for n in free}
            for n in sorted(free, key=lambda n: (likeness[n], n))[: num_keep // (pivots + text_pivots)]:
                kept.append(n)
                free.remove(n)
        return keep_only(set(visual), sorted(kept))(alive, None, prompt)

    return choose


def fitprune(visual: list[int], deletions: Mapping[int, int]) -> dict[int, Choose]:
    """Behind every layer given, so many tokens with the smallest product of received attention go."""

    def after(number: int) -> Choose:
        def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
            assert attention is not None
            strongest = attention.max(dim=0).values
            place = {token.number: i for i, token in enumerate(alive)}
            left = [n for n in visual if n in place]
            text = [n for n in range(min(visual), prompt) if n not in visual]
            score = {}
            for n in left:
                own = sum(float(strongest[place[i], place[n]]) for i in left) / len(left)
                cross = sum(float(strongest[place[i], place[n]]) for i in text)
                score[n] = own * cross
            gone = sorted(left, key=lambda n: (score[n], n))[:number]
            return keep_only(set(visual), [n for n in left if n not in gone])(alive, None, prompt)

        return choose

    return {layer + 1: after(number) for layer, number in deletions.items()}


def rater_numbers(tokens: Sequence[Token], visual: Sequence[int], prompt: int) -> list[int]:
    """Text behind the first visual token that is more relevant to the image than text is on average."""
    states = {token.number: token.state.detach() for token in tokens}
    text = [n for n in range(min(visual), prompt) if n not in visual]
    total = dict.fromkeys(text, 0.0)
    for v in visual:
        logits = [float(states[v] @ states[t]) for t in text]
        largest = max(logits)
        powers = [math.exp(x - largest) for x in logits]
        for t, power in zip(text, powers, strict=True):
            total[t] += power / sum(powers) / len(visual)
    mean = sum(total.values()) / len(total)
    return [t for t in text if total[t] > mean] or text


def density_peaks(states: Sequence[Tensor], num: int) -> tuple[list[int], list[int]]:
    """Centres, best first, and the cluster of every vector."""
    count, width = len(states), len(states[0])
    distance = [[float((a - b).norm()) / width**0.5 for b in states] for a in states]
    density = [math.exp(-sum(d * d for d in sorted(row)[:num]) / num) for row in distance]
    farthest = max(max(row) for row in distance)
    merit = []
    for i in range(count):
        denser = [j for j in range(count) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        merit.append(density[i] * min([distance[i][j] for j in denser], default=farthest))
    centres = sorted(range(count), key=lambda i: (-merit[i], i))[:num]
    cluster = [min(range(num), key=lambda c, i=i: (distance[i][centres[c]], c)) for i in range(count)]
    for c, i in enumerate(centres):
        cluster[i] = c
    return centres, cluster


def sparsevlm(
    images: Sequence[list[int]],
    raters: Sequence[int],
    counts: Mapping[int, Callable[[int, Tensor], int]],
    *,
    merges: bool,
    head_score: Callable[[Tensor, int, int], Tensor] | None = None,
) -> dict[int, Choose]:
    """
    Behind every layer given, every image keeps what raters attend to, and some means of the rest.

    Parameters
    ----------
    counts
        By layer, tokens kept of an image from its first number of tokens and the raters' attention ``[raters, V]``.
    merges
        Whether some of the pruned ones are merged.
    head_score
        Version 2.0: attention ``[H]`` of a rater to a token as it counts, by their numbers in the prompt; half of the
        heads are averaged. The mean over heads otherwise.
    """

    def after(layer: int) -> Choose:
        def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
            assert attention is not None
            place = {token.number: i for i, token in enumerate(alive)}
            for image in images:
                left = [token.number for token in alive if token.number in image]
                if not left:
                    continue
                table = torch.stack([torch.stack([attention[:, place[r], place[n]] for n in left]) for r in raters])
                if head_score is not None:
                    table = torch.stack(
                        [
                            torch.stack([head_score(attention[:, place[r], place[n]], r, n) for n in left])
                            for r in raters
                        ]
                    )
                    heads = table.sum(dim=(0, 1)).tolist()
                    chosen = sorted(range(len(heads)), key=lambda h: (-heads[h], h))[: len(heads) // 2]
                    table = table[..., chosen]
                rows = table.mean(dim=-1)
                scores = dict(zip(left, rows.mean(dim=0).tolist(), strict=True))
                num_keep = counts[layer](len(image), rows)
                if num_keep >= len(left):
                    continue
                order = sorted(left, key=lambda n, scores=scores: (-scores[n], left.index(n)))
                stay = [n for n in left if n in order[:num_keep]]
                by_number = {token.number: token for token in alive}
                if merges:
                    pruned = order[num_keep:]
                    recycled = pruned[: int(0.3 * len(pruned)) + 1]
                    num = int(len(recycled) / 10) + 1
                    states = [by_number[n].state for n in recycled]
                    centres, cluster = density_peaks(states, num)
                    for c, i in enumerate(centres):
                        members = [state for state, mine in zip(states, cluster, strict=True) if mine == c]
                        by_number[recycled[i]].state = sum(members) / (len(members) + 1e-6)  # type: ignore[call-overload]
                        stay.append(recycled[i])
                alive = keep_only(set(image), stay)(alive, None, prompt)
            return alive

        return choose

    return {layer + 1: after(layer) for layer in counts}


def exit_at(visual: Sequence[int]) -> Choose:
    """All visual tokens leave."""
    return keep_only(set(visual), [])


def patient(
    visual: Sequence[int], holds: Callable[[int, Tensor, int], bool], first: int, depth: int
) -> dict[int, Choose]:
    """Exit behind the first layer from ``first`` on where, as one before, ``holds(layer, attention, last row)``."""
    known: dict[int, bool] = {}

    def behind(layer: int) -> Choose:
        def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
            if not any(token.number in visual for token in alive):
                return alive
            assert attention is not None
            known[layer] = holds(layer, attention, prompt - 1)
            leaves = layer >= first and known[layer] and known.get(layer - 1, True)
            return exit_at(visual)(alive, None, prompt) if leaves else alive

        return choose

    return {layer + 1: behind(layer) for layer in range(max(first - 1, 0), depth - 1)}


def gated(visual: Sequence[int], gates: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, Choose]:
    """Behind the first layer whose gate gives its second output more than its first."""

    def behind(layer: int) -> Choose:
        def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
            state = {token.number: token.state for token in alive}
            text = [state[n] for n in range(max(visual) + 1, prompt - 1)]
            feature = torch.cat([torch.stack(text).mean(dim=0), state[prompt - 1]])
            inner, outer = gates[layer]
            keep, leave = outer @ torch.nn.GELU()(inner @ feature)
            return exit_at(visual)(alive, None, prompt) if leave > keep else alive

        return choose

    return {layer + 1: behind(layer) for layer in gates}
