"""
OPERA the slow way: one prompt, one candidate at a time, a forward over everything for each, full attention matrices.

Beam search itself is rendered with Python lists too; of transformers only the model's forward is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import full_logits


@dataclass
class Settings:
    image_tokens: tuple[int, ...]
    num_beams: int
    max_new_tokens: int
    eos: int
    scale_factor: float = 50.0
    threshold: float = 15
    candidates: int = 5
    weight: float = 1.0
    length_penalty: float = 1.0


@dataclass
class Outcome:
    """Best sequence first; per step, log-probabilities ``[beams, V]`` of the path that was taken in the end."""

    answers: list[list[int]]
    values: list[float]
    scores: list[Tensor]
    rollbacks: list[tuple[int, int]] = field(default_factory=list)
    locations: list[list[int]] = field(default_factory=list)


@dataclass
class State:
    """Everything one step of the search starts from."""

    beams: list[list[int]]
    sums: list[float]
    finished: list[tuple[float, list[int]]]


def look(model: Any, inputs: dict[str, Any], answer: list[int], seen_before: dict[Any, Any]) -> tuple[Tensor, Tensor]:
    """
    Logits ``[V]`` at the last token, and the last layer's ``[N, N]`` attention, largest over heads.

    A candidate that is chosen is the beam of the next step: the same forward is not run twice.
    """
    if tuple(answer) in seen_before:
        return seen_before[tuple(answer)]
    attention = model.model.language_model.layers[-1].self_attn
    seen: list[Tensor] = []
    hook = attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    logits = full_logits(model, inputs, torch.tensor([answer], dtype=torch.long).reshape(1, len(answer)))[0, -1]
    hook.remove()
    seen_before[tuple(answer)] = logits, seen[0][0].amax(dim=0)
    return seen_before[tuple(answer)]


def most_frequent(values: list[int]) -> int:
    return min(set(values), key=lambda value: (-values.count(value), value))


def opera(model: Any, inputs: dict[str, Any], settings: Settings) -> Outcome:
    """Search the answer to one prompt without padding."""
    prompt = inputs["input_ids"][0].tolist()
    start = len(prompt)
    seen: dict[Any, Any] = {}
    image = [i for i, token in enumerate(prompt) if token in settings.image_tokens]
    width = settings.num_beams
    state = State([[] for _ in range(width)], [0.0] + [-1e9] * (width - 1), [])
    history: list[State] = []
    records: list[list[int]] = []
    picks: list[list[tuple[int, int]]] = []
    steps: list[Tensor] = []
    attempts: dict[int, int] = {}
    rejected: dict[int, list[tuple[int, int]]] = {}
    outcome = Outcome([], [], [])
    while True:
        # Candidates, one forward for each.
        plain = [look(model, inputs, beam, seen)[0] for beam in state.beams]
        logits = torch.full((width, plain[0].numel()), -999.0)
        record = []
        for beam, tokens in enumerate(state.beams):
            order = sorted(range(len(plain[beam])), key=lambda v: (-float(plain[beam][v]), v))
            locations = []
            for token in order[: settings.candidates]:
                _, matrix = look(model, inputs, [*tokens, token], seen)
                matrix = matrix / matrix.sum(dim=-1, keepdim=True)
                local = settings.scale_factor * matrix[start:, start:]
                n = len(local)
                columns = [1e-7 * float(local[j:, j].double().prod()) for j in range(n)]
                stored = [float(torch.tensor(c, dtype=torch.float64).half()) for c in columns]
                locations.append(stored.index(max(stored)))
                penalty = max(stored) if n > 10 else -sum(float(matrix[-1, i]) for i in image)
                logits[beam, token] = plain[beam][token] - (settings.weight * penalty if settings.weight else 0.0)
            record.append(most_frequent(locations))
        records.append(record)
        history.append(state)
        n = len(history)
        # Retrospection.
        location = most_frequent(record)
        position = None
        if location >= 10 and all(sum(r[b] == location for r in records) > settings.threshold for b in range(width)):
            position = location + 1
            if attempts.get(position, 0) >= settings.candidates:
                position -= 1
            if attempts.get(position, 0) >= settings.candidates:
                position = None
        if position is not None:
            attempts[position] = attempts.get(position, 0) + 1
            back = min(position, n - 2)
            outcome.rollbacks.append((n - 1, position))
            rejected[position + 1] = []
            rejected.setdefault(position, []).extend(picks[back])
            state = history[back]
            history, records = history[: back + 1], records[: back + 1]
            picks, steps = picks[:back], steps[:back]
            logits = torch.stack([look(model, inputs, beam, seen)[0] for beam in state.beams])
            logits = logits - (999.0 + logits.amin(dim=-1, keepdim=True))
            for beam, token in rejected[position]:
                logits[beam, token] = -999.0
        scores = logits.log_softmax(dim=-1)
        steps.append(scores)
        # Selection: enough continuations that as many beams go on, whatever ends.
        total = [(state.sums[b] + float(scores[b, v]), b, v) for b in range(width) for v in range(scores.shape[1])]
        total.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
        best = total[: 2 * width]
        length = len(state.beams[0]) + 1
        last = length == settings.max_new_tokens
        going, finished = [], list(state.finished)
        for rank, (value, beam, token) in enumerate(best):
            if token == settings.eos or last:
                if rank < width:
                    finished.append((value / length**settings.length_penalty, [*state.beams[beam], token]))
            else:
                going.append((value, beam, token))
        finished.sort(key=lambda entry: -entry[0])
        finished = finished[:width]
        hopeless = False
        if not last:
            picked = going[:width]
            picks.append([(beam, token) for _, beam, token in picked])
            state = State([[*state.beams[b], v] for _, b, v in picked], [value for value, _, _ in picked], finished)
            hopeless = len(finished) == width and state.sums[0] / length**settings.length_penalty <= finished[-1][0]
        if last or hopeless:
            outcome.answers = [tokens for _, tokens in finished]
            outcome.values = [value for value, _ in finished]
            outcome.scores = steps
            outcome.locations = records
            return outcome
