"""
Attention rollout: the product of the layers' attention matrices, residual connections included.

"Quantifying Attention Flow in Transformers" (ACL 2020, 2005.00928): ``A' = (A + I)`` with rows divided by their sum,
heads averaged, layers multiplied; the row that chooses a token. Made for encoders and known to be poor for causal
decoders, where mass collapses to the first positions (`lmmhooks.inspect.maps.flow` corrects that); here for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmmhooks.inspect.maps.base import MapKind, Question
from lmmhooks.inspect.maps.matrices import Matrices

__all__ = ["Rollout", "read_matrices", "residual", "rollout_rows"]


def residual(matrix: Tensor) -> Tensor:
    """``A + I`` with rows divided by their sum, ``[N, N]``."""
    with_identity = matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return with_identity / with_identity.sum(dim=-1, keepdim=True)


def rollout_rows(matrices: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """
    Rows of the rollout ``A'_L ... A'_1``.

    Parameters
    ----------
    matrices
        Head means ``[N, N]``, first layer first.
    rows
        Which rows.

    Returns
    -------
    Tensor
        ``[rows, N]``; each sums to 1.
    """
    vectors = torch.eye(len(matrices[0]), dtype=matrices[0].dtype)[list(rows)]
    for matrix in reversed(matrices):
        vectors = vectors @ residual(matrix)
    return vectors


def read_matrices(question: Question, kind: str, reduce: object, num_tokens: int) -> list[Tensor]:
    """
    Attention matrices of the prompt and of some tokens of the answer, which are read one by one as the answer was.

    Parameters
    ----------
    question
        Names layers.
    kind
        For errors.
    reduce
        See `Matrices`.
    num_tokens
        Tokens of the answer that are read.

    Returns
    -------
    list of Tensor
        ``[P + num_tokens, P + num_tokens]`` per layer; empty where ``reduce`` keeps nothing.
    """
    matrices = Matrices(question.passes.runtime, question.layers, reduce)  # type: ignore[arg-type] # see `Matrices`
    length = question.prompt_length + num_tokens
    with matrices.runtime.probing(matrices.probes), torch.no_grad():
        replay = question.passes.replay()
        replay.read()
        for token in question.answered.new_ids[:num_tokens]:
            replay.step(token)
        question.passes.check_inserted(num_tokens, kind)
        dense = matrices.dense(length)
    return [dense[layer] for layer in question.layers if layer in dense]


@dataclass(frozen=True)
class Rollout(MapKind):
    """Attention rolled out over the layers."""

    id: ClassVar[str] = "rollout"
    paper: ClassVar[str] = "Attention rollout, ACL 2020 (2005.00928)"

    def values(self, question: Question) -> Tensor:
        last, heads = max(question.rows), list(question.heads)
        question.passes.check_length(question.prompt_length + last, self.id)
        matrices = read_matrices(question, self.id, lambda layer, weights: weights[heads].mean(dim=0), last)
        rows = rollout_rows(matrices, [question.prompt_length - 1 + t for t in question.rows])
        return question.without_gone(rows[:, question.positions])
