"""
Branches that show something else in an image's place, the slow way.

Every branch of every row is a pass of its own through the decoder, layer by layer, over prompt and answer so far, with
tokens in a Python list: no padding, no cache, no hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.reference.attention import full_logits
from tests.reference.reduction import Token, reduced_logits

#: More than any prompt here has tokens.
GONE = 10_000

#: Tokens of a row as they enter the decoder -> those of a branch.
Change = Callable[[list[Token]], list[Token]]
#: (row, answer [B, t]) -> logits [vocabulary] of one branch.
Branch = Callable[[int, Tensor], Tensor]
#: (main logits [V], logits of the others, row, step) -> logits [V]
Combine = Callable[[Tensor, list[Tensor], int, int], Tensor]


def changed(model: Any, inputs: dict[str, Any], changes: Sequence[Change]) -> Branch:
    """A branch in which the tokens of row b are what ``changes[b]`` makes of them."""

    def logits(row: int, answer: Tensor) -> Tensor:
        cut = lambda alive, attention, prompt: changes[row](alive)  # noqa: E731
        return reduced_logits(model, inputs, row, {0: (cut, False)}, answer)[-1]

    return logits


def image_runs(ids: Tensor, mask: Tensor, image_token: int) -> list[list[int]]:
    """Numbers of the visual tokens of every image of a row, padding not counted."""
    runs: list[list[int]] = []
    before = False
    for number, token in enumerate(ids[mask.bool()].tolist()):
        if token == image_token:
            runs = runs if before else [*runs, []]
            runs[-1].append(number)
        before = token == image_token
    return runs


def blanked(keep: set[int], runs: Sequence[Sequence[int]]) -> Change:
    """Visual tokens that are not kept have embedding zero, and no features of deepstack either."""
    visual = {number for run in runs for number in run}

    def change(tokens: list[Token]) -> list[Token]:
        for token in tokens:
            if token.number in visual - keep:
                token.state = torch.zeros_like(token.state)
                token.deepstack = [torch.zeros_like(extra) for extra in token.deepstack]
        return tokens

    return change


def replaced(shown: dict[int, list[int] | list[Tensor]], gone: set[int]) -> Change:
    """
    Something else in the place of images, at plain text positions.

    ``shown`` says, at the number of an image's first token, which visual tokens stand there, or which embeddings;
    ``gone`` are the tokens that are not read as they were.
    """

    def change(tokens: list[Token]) -> list[Token]:
        by_number = {token.number: token for token in tokens}
        out: list[Token] = []
        for token in tokens:
            for what in shown.get(token.number, []):
                if isinstance(what, Tensor):
                    out.append(Token(token.number, token.position, what, []))
                else:
                    found = by_number[what]
                    out.append(Token(found.number, found.position, found.state, found.deepstack))
            if token.number not in gone:
                out.append(token)
        depth = max(len(token.deepstack) for token in tokens)
        for place, token in enumerate(out):
            token.position = torch.full_like(token.position, place)
            # Behind all that are gone: the last token is the one with the largest number.
            token.number = GONE + place
            token.deepstack = token.deepstack or [torch.zeros_like(token.state)] * depth
        return out

    return change


@torch.no_grad()
def prompt_attention(eager: Any, inputs: dict[str, Any]) -> Tensor:
    """``[layers, B, N]`` that the last token of left-padded prompts pays in every layer, head mean."""
    seen: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1][:, :, -1].mean(dim=1)))
        for layer in eager.model.language_model.layers
    ]
    try:
        full_logits(eager, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def of_image(attention: Tensor, mask: Tensor, row: int, run: Sequence[int]) -> Tensor:
    """``[layers, n]`` of one image of a row."""
    return attention[:, row, mask[row].bool()][:, list(run)]


class NaiveRows(LogitsProcessor):
    """Combined logits by separate passes; as a logits processor it replaces whatever the model said."""

    def __init__(self, model: Any, inputs: dict[str, Any], branches: Sequence[Branch], combine: Combine) -> None:
        self.model, self.inputs, self.branches, self.combine = model, inputs, branches, combine
        self.batch, self.length = inputs["input_ids"].shape

    def logits(self, answer: Tensor) -> Tensor:
        """``[B, vocabulary]`` after ``answer [B, t]``."""
        main = full_logits(self.model, self.inputs, answer)[:, -1]
        return torch.stack(
            [
                self.combine(main[row], [branch(row, answer) for branch in self.branches], row, answer.shape[1])
                for row in range(self.batch)
            ]
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answers = input_ids[:, self.length :]
        copies = len(answers) // self.batch
        out = torch.empty_like(scores)
        for copy in range(copies):
            out[copy::copies] = self.logits(answers[copy::copies])
        # Processors of generate itself have already dropped some tokens.
        return out.log_softmax(dim=-1).masked_fill(scores == -math.inf, -math.inf)


def naive_tokens(naive: NaiveRows, **kwargs: Any) -> Tensor:
    """New tokens of the untouched model's ``generate`` on naive logits."""
    out = naive.model.generate(**naive.inputs, logits_processor=LogitsProcessorList([naive]), **kwargs)
    return out[:, naive.length :]


def contrast(weights: Sequence[float], beta: float) -> Combine:
    """``sum w_i L_i`` on plausible tokens, one token at a time."""

    def combine(main: Tensor, others: list[Tensor], row: int, step: int) -> Tensor:
        cut = float(main.max()) + (math.log(beta) if beta else -math.inf)
        columns = zip(*(logits.tolist() for logits in (main, *others)), strict=True)
        kept = (
            sum(w * x for w, x in zip(weights, column, strict=True)) if column[0] >= cut else -math.inf
            for column in columns
        )
        return torch.tensor(list(kept))

    return combine


def blind(attention: Tensor, gamma: float, lam: float) -> list[int]:
    """Tokens that AvisC lets the biased branch see; ``attention [layers, n]``."""
    share = [float(row.sum()) for row in attention]
    total = sum(share)
    order = sorted(range(len(share)), key=lambda layer: -share[layer])
    layers, reached = [], 0.0
    for layer in order:
        layers.append(layer)
        reached += share[layer] / total
        if reached >= gamma:
            break
    mean = [sum(float(attention[layer, j]) for layer in layers) / len(layers) for j in range(attention.shape[1])]
    middle = sum(mean) / len(mean)
    spread = math.sqrt(sum((x - middle) ** 2 for x in mean) / (len(mean) - 1))
    return [j for j, x in enumerate(mean) if x >= middle + lam * spread]


def attended(attention: Tensor, share: float) -> list[int]:
    """Tokens that MoD keeps; ``attention [layers, n]``."""
    total = [sum(float(row[j]) for row in attention) for j in range(attention.shape[1])]
    order = sorted(range(len(total)), key=lambda j: total[j])
    return order[int(len(total) * (1 - share)) :]


def jensen_shannon(main: Tensor, other: Tensor) -> float:
    """In nats, probabilities clipped."""
    p, q = ([min(max(x, 5e-8), 1 - 5e-8) for x in logits.double().softmax(-1).tolist()] for logits in (main, other))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def divergence(one: list[float]) -> float:
        return sum(a * math.log(a / m) for a, m in zip(one, middle, strict=True))

    return (divergence(p) + divergence(q)) / 2


class MixtureOfDecoding:
    """The formula of MoD; remembers per row, and beam copy, what was chosen at the first token."""

    def __init__(self, add: float, subtract: float, tau: float, beta: float) -> None:
        self.add, self.subtract, self.tau, self.beta = add, subtract, tau, beta
        self.added: dict[int, bool] = {}

    def __call__(self, main: Tensor, others: list[Tensor], row: int, step: int) -> Tensor:
        if step == 0:
            self.added[row] = jensen_shannon(main, others[0]) < self.tau
        weights = (1.0, self.add) if self.added[row] else (1 + self.subtract, -self.subtract)
        return contrast(weights, self.beta)(main, others, row, step)
