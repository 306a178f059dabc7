"""
Decoding methods that read the decoder, the slow way: at every step a forward over the whole sequence, no cache.

Hooks on the model note what its layers were given; every formula then runs row by row, layer by layer and token by
token on what one row showed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.reference.attention import full_logits
from tests.zoo import IMAGE

__all__ = ["NaiveReading", "Seen", "deco", "dola", "naive_generate", "only", "revisit"]


@dataclass
class Seen:
    """
    What one row showed at its newest token.

    ``states[j]`` is the input of decoder layer j, the last entry the normed output, each ``[n, D]`` without padding.
    ``weights [H, n]`` and ``values [n, H, d]`` belong to one layer; ``visual`` are positions.
    """

    model: Any
    logits: Tensor
    states: list[Tensor]
    weights: Tensor
    values: Tensor
    visual: list[int]

    def head(self, state: Tensor) -> Tensor:
        return self.model.lm_head(state)

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model


#: Of one row, what it showed -> logits [V]
Rule = Callable[[Seen], Tensor]


class NaiveReading(LogitsProcessor):
    """Logits of a rule by forwards without cache; ``model`` attends eagerly, attention of ``layer`` is noted."""

    def __init__(self, model: Any, inputs: dict[str, Any], rule: Rule, layer: int = 0) -> None:
        self.model, self.inputs, self.rule, self.layer = model, inputs, rule, layer
        self.length = inputs["input_ids"].shape[1]
        self.batch = inputs["input_ids"].shape[0]

    @torch.no_grad()
    def seen(self, answer: Tensor) -> list[Seen]:
        """Every row after ``answer [B, t]``."""
        decoder = self.model.model.language_model
        states: dict[int, Tensor] = {}
        weights: list[Tensor] = []

        def note(layer: int) -> Any:
            return lambda module, args, kwargs: states.update({layer: args[0] if args else kwargs["hidden_states"]})

        attention = decoder.layers[self.layer].self_attn
        hooks = [
            module.register_forward_pre_hook(note(layer), with_kwargs=True)
            for layer, module in enumerate(decoder.layers)
        ]
        hooks.append(decoder.norm.register_forward_hook(lambda m, a, out: states.update({len(decoder.layers): out})))
        hooks.append(attention.register_forward_hook(lambda m, a, out: weights.append(out[1])))
        try:
            logits = full_logits(self.model, self.inputs, answer)[:, -1]
        finally:
            for hook in hooks:
                hook.remove()
        heads, width = weights[0].shape[1], attention.head_dim
        normed = decoder.layers[self.layer].input_layernorm(states[self.layer])
        values = attention.v_proj(normed).unflatten(-1, (-1, width))
        values = values.repeat_interleave(heads // values.shape[2], dim=2)
        out = []
        for row in range(self.batch):
            tokens = torch.cat([self.inputs["input_ids"][row], answer[row]])
            valid = torch.cat([self.inputs["attention_mask"][row].bool(), torch.ones_like(answer[row]).bool()])
            prompt_ids = tokens[: self.length][valid[: self.length]].tolist()
            visual = [place for place, token in enumerate(prompt_ids) if token == IMAGE]
            out.append(
                Seen(
                    self.model,
                    logits[row],
                    [states[layer][row][valid] for layer in range(len(decoder.layers) + 1)],
                    weights[0][row, :, -1][:, valid],
                    values[row][valid],
                    visual,
                )
            )
        return out

    @torch.no_grad()
    def logits(self, answer: Tensor) -> Tensor:
        """``[B, vocabulary]`` after ``answer [B, t]``."""
        return torch.stack([self.rule(row) for row in self.seen(answer)])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answers = input_ids[:, self.length :]
        copies = len(answers) // self.batch
        out = torch.empty_like(scores)
        for copy in range(copies):
            out[copy::copies] = self.logits(answers[copy::copies])
        # Beam search adds log-probabilities; softmax and argmax do not mind.
        return out.log_softmax(dim=-1)


def naive_generate(model: Any, inputs: dict[str, Any], rule: Rule, layer: int = 0, **kwargs: Any) -> Tensor:
    """New tokens ``[rows, t]`` of the model's own ``generate`` on naive logits."""
    naive = NaiveReading(model, inputs, rule, layer)
    out = model.generate(**inputs, logits_processor=LogitsProcessorList([naive]), **kwargs)
    return out[:, naive.length :]


def shares(logits: Sequence[float]) -> list[float]:
    """Softmax of a list."""
    most = max(logits)
    powers = [math.exp(value - most) for value in logits]
    return [power / sum(powers) for power in powers]


def logs(logits: Sequence[float]) -> list[float]:
    """Log-softmax of a list."""
    most = max(logits)
    total = math.log(sum(math.exp(value - most) for value in logits)) + most
    return [value - total for value in logits]


def divergence(main: Sequence[float], other: Sequence[float]) -> float:
    """Mixture against each, mean over the vocabulary, entry by entry."""
    total = 0.0
    for p, q, log_p, log_q in zip(shares(main), shares(other), logs(main), logs(other), strict=True):
        mixed = (p + q) / 2
        total += mixed * (math.log(mixed) - log_p) + mixed * (math.log(mixed) - log_q) if mixed else 0.0
    return total / 2 / len(main)


def cut(main: Sequence[float], beta: float) -> list[int]:
    """Plausible tokens, ascending."""
    threshold = max(main) + (math.log(beta) if beta else -math.inf)
    return [token for token, value in enumerate(main) if value >= threshold]


def spread(scores: dict[int, float], size: int) -> Tensor:
    return torch.tensor([scores.get(token, -math.inf) for token in range(size)])


def deco(alpha: float, layers: Sequence[int], top_p: float, top_k: int) -> Rule:
    """The surest earlier layer corrects the candidates."""

    def rule(seen: Seen) -> Tensor:
        main = seen.logits.tolist()
        probs = shares(main)
        candidates: list[int] = []
        total = 0.0
        for token in sorted(range(len(main)), key=lambda token: (-probs[token], token)):
            if len(candidates) == top_k:
                break
            candidates.append(token)
            total += probs[token]
            if total >= top_p:
                break
        best, surest = -1.0, []
        for layer in layers:
            state = seen.states[layer][-1]
            normed = state if layer == len(seen.states) - 1 else seen.decoder.norm(state)
            early = seen.head(normed).tolist()
            for token in candidates:
                if (prob := shares(early)[token]) > best:
                    best, surest = prob, early
        return spread({token: main[token] + alpha * best * surest[token] for token in candidates}, len(main))

    return rule


def dola(layers: Sequence[int], beta: float, normed: bool = False) -> Rule:
    """The early layer that differs most is subtracted."""

    def rule(seen: Seen) -> Tensor:
        main = seen.logits.tolist()
        most, far = -math.inf, []
        for layer in layers:
            state = seen.states[layer][-1]
            early = seen.head(seen.decoder.norm(state) if normed else state).tolist()
            if (distance := divergence(main, early)) > most:
                most, far = distance, early
        ours, theirs = (logs(main), logs(far)) if beta else (main, far)
        return spread({token: ours[token] - theirs[token] for token in cut(main, beta)}, len(main))

    return rule


def revisit(layers: Sequence[int], beta: float) -> Rule:
    """Logits of every visual token in every layer, restricted to plausible tokens; the closest one counts once."""

    def rule(seen: Seen) -> Tensor:
        main = seen.logits.tolist()
        keep = cut(main, beta)
        if not seen.visual:
            return seen.logits
        least, closest = math.inf, []
        for layer in layers:
            for place in seen.visual:
                logits = seen.head(seen.states[layer][place]).tolist()
                candidate = [logits[token] for token in keep]
                if (distance := divergence([main[token] for token in keep], candidate)) < least:
                    least, closest = distance, candidate
        ours, theirs = logs([main[token] for token in keep]), logs(closest)
        return spread({token: ours[i] + theirs[i] for i, token in enumerate(keep)}, len(main))

    return rule


def only(a_pos: float, a_neg: float, gamma: float, beta: float, layer: int) -> Rule:
    """One head and one key at a time; the last block's parts called on a single state."""

    def without_outliers(weights: list[float], places: Sequence[int]) -> None:
        part = [weights[place] for place in places]
        mean = sum(part) / len(part)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in part) / (len(part) - 1))
        for place in places:
            if weights[place] > mean + deviation:
                weights[place] = 0.0

    def entropy(weights: list[float], places: Sequence[int]) -> float:
        total = sum(weights[place] for place in places)
        part = [weights[place] / total for place in places]
        return -sum(share * math.log(share + 1e-6) for share in part)

    def rule(seen: Seen) -> Tensor:
        if not seen.visual:
            return seen.logits
        heads, length = seen.weights.shape
        text = [place for place in range(1, length) if place not in seen.visual]
        rows, ratios = [], []
        for head in range(heads):
            weights = seen.weights[head].tolist()
            without_outliers(weights, text)
            without_outliers(weights, seen.visual)
            rows.append(weights)
            ratios.append(entropy(weights, text) / entropy(weights, seen.visual))
        outputs = []
        for head in range(heads):
            gathered = torch.zeros(seen.values.shape[-1])
            if ratios[head] >= sum(ratios) / heads:
                for place in range(length):
                    gathered += rows[head][place] * seen.values[place, head]
            outputs.append(gathered)
        layers = seen.decoder.layers
        context = layers[layer].self_attn.o_proj(torch.cat(outputs))
        state = layers[-1].input_layernorm(context) + 0.2 * seen.states[-2][-1]
        state = state + layers[-1].mlp(layers[-1].post_attention_layernorm(state))
        other = seen.head(seen.decoder.norm(state) + 0.5 * seen.states[-1][-1]).tolist()
        main = seen.logits.tolist()
        distance = sum(abs(p - q) for p, q in zip(shares(main), shares(other), strict=True))
        scores = {}
        for token in cut(main, beta):
            if distance < gamma:
                scores[token] = main[token] + a_pos * other[token]
            else:
                scores[token] = (1 + a_neg) * main[token] - a_neg * other[token]
        return spread(scores, len(main))

    return rule
