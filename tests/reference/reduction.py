"""
Token reduction the slow way: every row of a batch alone, without padding, cache or hooks, one layer after the other.

Tokens that leave are taken out of a Python list. A decode step is rendered as one pass over prompt and answer so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.reference.attention import positions_of


@dataclass
class Token:
    """One token of a row: number in the unpadded prompt and answer, position(s), state, features still to be added."""

    number: int
    position: Tensor
    state: Tensor
    deepstack: list[Tensor]


#: (tokens alive, attention [H, N, N] of the layer before or None, number of prompt tokens) -> tokens alive, in order
Choose = Callable[[list[Token], "Tensor | None", int], list[Token]]


@torch.no_grad()
def reduced_logits(
    model: Any, inputs: dict[str, Any], row: int, cuts: dict[int, tuple[Choose, bool]], answer: Tensor | None = None
) -> Tensor:
    """
    Logits ``[N, vocabulary]`` of one row, padding left out, dropped tokens in the state they left with.

    Parameters
    ----------
    model
        With eager attention.
    inputs
        Of the whole batch.
    cuts
        By layer: who stays, and whether those are renumbered from 0.
    answer
        ``[B, t]`` tokens after the prompt.
    """
    prompt = int(inputs["attention_mask"][row].sum())
    text = model.model.language_model
    alive = _tokens(model, inputs, row, answer)
    final: dict[int, Tensor] = {}
    weights: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1][0]))
        for layer in text.layers
    ]
    try:
        for number, layer in enumerate(text.layers):
            if number in cuts:
                choose, renumber = cuts[number]
                stay = choose(list(alive), weights[-1] if weights else None, prompt)
                final.update({t.number: t.state for t in alive if t.number not in {s.number for s in stay}})
                alive = stay
                if renumber:
                    for place, token in enumerate(alive):
                        token.position = torch.tensor(place)
            hidden = torch.stack([token.state for token in alive])[None]
            positions = torch.stack([token.position for token in alive], dim=-1)
            positions = positions[:, None] if positions.ndim == 2 else positions[None]
            n = len(alive)
            mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=text.rotary_emb(hidden, positions),
                past_key_values=None,
            )
            for token, state in zip(alive, hidden[0], strict=True):
                token.state = state + token.deepstack[number] if number < len(token.deepstack) else state
    finally:
        for hook in hooks:
            hook.remove()
    final.update({token.number: token.state for token in alive})
    states = torch.stack([final[number] for number in sorted(final)])
    return model.lm_head(text.norm(states))


def _tokens(model: Any, inputs: dict[str, Any], row: int, answer: Tensor | None) -> list[Token]:
    """What enters the decoder in a plain forward over prompt and answer."""
    inputs = dict(inputs)
    if answer is not None and answer.shape[1]:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([types, types.new_zeros(answer.shape)], dim=1)
    if (positions := positions_of(model, inputs)) is not None:
        inputs["position_ids"] = positions
    seen: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    positions = seen["position_ids"]
    if positions.ndim == 3:
        positions = positions[-3:]
    visual, features = seen.get("visual_pos_masks"), seen.get("deepstack_visual_embeds") or []
    rank = visual.flatten().cumsum(0).view_as(visual) - 1 if visual is not None else None
    tokens: list[Token] = []
    for column in range(inputs["input_ids"].shape[1]):
        if not inputs["attention_mask"][row, column]:
            continue
        extra = [f[rank[row, column]] if visual[row, column] else torch.zeros(f.shape[1]) for f in features]
        state = seen["inputs_embeds"][row, column]
        tokens.append(Token(len(tokens), positions[..., row, column], state, extra))
    return tokens


def keep_only(visual: set[int], stay: list[int]) -> Choose:
    """Of the tokens numbered ``visual`` only ``stay`` remain, in that order, where the image was."""

    def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
        order = iter(stay)
        by_number = {token.number: token for token in alive}
        out = []
        for token in alive:
            if token.number not in visual:
                out.append(token)
            elif token.number in stay:
                out.append(by_number[next(order)])
        return out

    return choose


def best(scores: dict[int, float], num_keep: int) -> list[int]:
    """Keys with the largest scores, ascending; the lower key wins a tie."""
    return sorted(sorted(scores, key=lambda key: (-scores[key], key))[:num_keep])


def fastv(images: list[list[int]], num_keep: int, *, per_image: bool = False) -> Choose:
    """Last prompt row of the layer before, head mean, one visual token at a time."""

    def choose(alive: list[Token], attention: Tensor | None, prompt: int) -> list[Token]:
        assert attention is not None
        place = {token.number: i for i, token in enumerate(alive)}
        last = place[prompt - 1]
        stay: list[int] = []
        for group in images if per_image else [[number for image in images for number in image]]:
            scores = {
                number: sum(float(attention[head, last, place[number]]) for head in range(attention.shape[0]))
                / attention.shape[0]
                for number in group
                if number in place
            }
            stay += best(scores, num_keep)
        return keep_only({number for image in images for number in image}, stay)(alive, attention, prompt)

    return choose


@contextmanager
def tower_attention(model: Any, seen: dict[int, list[Tensor]]) -> Iterator[None]:
    """Run the vision tower with full attention matrices, noted per layer: ``[crops, H, n, n]`` per call."""
    layers = next(
        m
        for m in model.model.modules()
        if type(m) is torch.nn.ModuleList and m is not model.model.language_model.layers
    )
    tower = [layer for layer in layers if any("Attention" in type(child).__name__ for child in layer.children())]
    attention = {
        next(child for child in layer.children() if type(child).__name__.endswith("Attention")): number
        for number, layer in enumerate(tower)
    }

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        scaling = kwargs.get("scaling") or q.shape[-1] ** -0.5
        weights = torch.softmax((q @ k.transpose(2, 3) * scaling).float(), dim=-1)
        seen.setdefault(attention[module], []).append(weights)
        return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_tower", attend)
    AttentionMaskInterface.register("test_tower", eager_mask)
    configs = {id(module.config): module.config for module in attention}.values()
    before = {id(config): config._attn_implementation for config in configs}
    for config in configs:
        config._attn_implementation_internal = "test_tower"
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = before[id(config)]
