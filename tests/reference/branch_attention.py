"""Branches with attention of their own, the slow way: full attention matrices, one row and key at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import Edit, dense_attention, full_logits
from tests.reference.branch_features import Branch

#: (row, columns of prompt and answer that are no padding) -> edits of logits and of weights
Edits = Callable[[int, list[int]], tuple[Edit | None, Edit | None]]


def attending(model: Any, inputs: dict[str, Any], edits: Edits) -> Branch:
    """A branch whose decoder runs with full matrices and these edits in the row that is asked for."""

    def logits(row: int, answer: Tensor) -> Tensor:
        length = inputs["input_ids"].shape[1] + answer.shape[1]
        padding = int((inputs["attention_mask"][row] == 0).sum())
        scores, weights = edits(row, list(range(padding, length)))

        def only(change: Edit | None) -> Edit | None:
            if change is None:
                return None
            return lambda layer, values, b, hidden: change(layer, values, b, hidden) if b == row else values

        with dense_attention(model, only(weights), scores=only(scores)):
            return full_logits(model, inputs, answer)[row, -1]

    return logits


def least_attended(visual: list[list[int]], prompt: int, first_layer: int, num_shown: int) -> Edits:
    """
    SID: from ``first_layer`` on a row hides all but the least attended visual keys.

    ``visual`` are the columns of every row's visual tokens; rows of the prompt are ranked for by its last one, those
    behind it by themselves, in the layer before.
    """

    def edits(row: int, columns: list[int]) -> tuple[Edit, Edit]:
        hidden: dict[int, list[int]] = {}

        def rank(layer: int, weights: Tensor, b: int, states: Tensor) -> Tensor:
            if layer == first_layer - 1:
                mean = weights.mean(dim=0)
                for query in columns:
                    by = mean[max(query, prompt - 1)]
                    order = sorted(visual[row], key=lambda column: float(by[column]))
                    hidden[query] = order[num_shown:]
            return weights

        def hide(layer: int, logits: Tensor, b: int, states: Tensor) -> Tensor:
            if layer >= first_layer:
                for query in columns:
                    logits[:, query, hidden[query]] = -1e9
            return logits

        return hide, rank

    return edits


def counterfactual(
    edit: str, layers: set[int], prompt: int, renormalize: bool, draw: Callable[[int, int, int, int], float]
) -> Edits:
    """
    CausalMM's language side: weights of some layers replaced; ``prompt`` is the number of columns of the prompt.

    ``draw(layer, head, query, key)`` gives the random numbers, tokens counted without padding.
    """

    def edits(row: int, columns: list[int]) -> tuple[None, Edit]:
        tokens = sum(column < prompt for column in columns)

        def change(layer: int, weights: Tensor, b: int, states: Tensor) -> Tensor:
            if layer not in layers:
                return weights
            out = torch.zeros_like(weights)
            for head in range(len(weights)):
                for i, query in enumerate(columns):
                    before = [float(weights[head, query, columns[j]]) for j in range(i + 1)]
                    extent = max(tokens, i + 1)
                    if edit == "uniform":
                        after = [1 / extent] * (i + 1)
                    elif edit == "reverse":
                        after = [max(before) - x for x in before]
                    else:
                        numbers = [draw(layer, head, i, j) for j in range(extent)]
                        after = [x / sum(numbers) for x in numbers[: i + 1]]
                    if renormalize:
                        after = [x / sum(after) for x in after] if sum(after) > 1e-6 else before
                    for j, x in enumerate(after):
                        out[head, query, columns[j]] = x
            return out

        return None, change

    return edits
