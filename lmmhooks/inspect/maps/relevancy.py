"""
Relevancy maps: gradient-weighted attention, carried from layer to layer.

"Generic Attention-model Explainability" (ICCV 2021, 2103.15679), for language models of images in LVLM-Interpret
(2404.03118), code IntelLabs/lvlm-interpret: ``C = mean_h relu(G A)`` in every layer, G the gradient of the logit of the
token that is chosen, ``R <- R + C R`` from R = I, row of the newest position. At later tokens the row of the newest
position is added below the matrices of the prompt, which stay those of the first token. The vision tower is not chained
in; the image's tokens are where the map ends. Needs the graph of the whole prompt: small inputs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question
from lmmhooks.inspect.maps.derivatives import WatchedWeights, through_rows

__all__ = ["Relevancy", "grow", "relevance_matrix", "relevance_row", "relevancy_update", "rescaled"]


def relevance_matrix(weights: Tensor, gradient: Tensor) -> Tensor:
    """``C = mean_h relu(G A)``: ``[H, R, N]`` twice to ``[R, N]``."""
    return (weights * gradient).clamp(min=0).mean(dim=0)


def relevancy_update(relevance: Tensor, matrix: Tensor) -> Tensor:
    """``R + C R`` for square R and C; the identity where C is 0."""
    return relevance + matrix @ relevance


def rescaled(relevance: Tensor, identity: Tensor | None = None) -> Tensor:
    """
    Relevance whose rows, the identity apart, sum to 1 (or 0, where they are 0).

    An option of LVLM-Interpret: the identity is taken off, rows are divided by their sum, and it is put back.

    Parameters
    ----------
    relevance
        ``[N, N]``, or some of its rows.
    identity
        The same rows of the identity; None: all of them.
    """
    if identity is None:
        identity = torch.eye(len(relevance), dtype=relevance.dtype, device=relevance.device)
    rest = relevance - identity
    total = rest.sum(dim=-1, keepdim=True)
    return rest / torch.where(total == 0, 1.0, total) + identity


def relevance_row(matrices: Sequence[Tensor], row: int = -1) -> Tensor:
    """
    One row of R after all updates, without the others.

    R is the product of the ``I + C`` with the last layer on the left, so that a row vector suffices, taken through them
    from the last layer down.

    Parameters
    ----------
    matrices
        ``[N, N]`` per layer, first layer first.
    row
        Which row.
    """
    vector = torch.zeros_like(matrices[0][row])
    vector[row] = 1.0
    for matrix in reversed(matrices):
        vector = vector + vector @ matrix
    return vector


def grow(matrix: Tensor, row: Tensor) -> Tensor:
    """A matrix ``[N, N]`` with one more column, of zeros, and below it the row ``[N + 1]`` of the new position."""
    return torch.cat([torch.nn.functional.pad(matrix, (0, 1)), row[None]])


@dataclass(frozen=True)
class Relevancy(MapKind):
    """
    Relevance of every visual token for every token of the answer.

    Attributes
    ----------
    rescale
        Divide rows of the final matrix by their sum, the identity apart; see `rescaled`.
    """

    rescale: bool = False

    id: ClassVar[str] = "relevancy"
    paper: ClassVar[str] = "LVLM-Interpret (2404.03118)"

    def values(self, question: Question) -> Tensor:
        new, length = question.answered.new_ids, question.prompt_length
        last = max(question.rows)
        question.passes.check_length(length + last, self.id)
        found: list[Tensor] = []
        with through_rows(question.passes, question.layers, whole=True) as reading:
            matrices: list[Tensor] = []
            for t in range(last + 1):
                with reading.recording():
                    logits = reading.replay.step(new[t - 1]) if t else reading.replay.read()
                    question.passes.check_inserted(t, self.id)
                    by_layer = reading.by_weights(logits[0].float()[new[t]])
                    read = [_dense(question, by_layer.get(layer, []), length + t) for layer in question.layers]
                matrices = [grow(c, row[-1]) for c, row in zip(matrices, read, strict=True)] if t else read
                if t in question.rows:
                    row = relevance_row(matrices)
                    if self.rescale:
                        row = rescaled(row, torch.eye(len(row))[-1])
                    found.append(row[question.positions])
        return question.without_gone(torch.stack(found))


def _dense(question: Question, blocks: Sequence[tuple[WatchedWeights, Tensor]], length: int) -> Tensor:
    """The relevance matrix of a layer in places of the prompt as given ``[length, length]``, 0 where nothing is."""
    heads = list(question.heads)
    full = torch.zeros(length, length)
    for block, gradient in blocks:
        known = (block.columns >= 0).nonzero().flatten()
        real = (block.rows >= 0).nonzero().flatten()
        matrix = relevance_matrix(block.weights[heads], gradient[heads]).cpu()
        full[block.rows[real][:, None], block.columns[known]] = matrix[real][:, known]
    return full
