"""
Attention flow of VL-SAM: rollout with weighted heads and a correction for the causal mask; see `VlSam`.

UNVERIFIED, because only restatements of the paper were at hand: the start F = S, whether columns are corrected after
every layer or once at the end, and that L in the correction means the length of a column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["REGULARISE", "column_factors", "flow_rows", "head_weights", "weighted_mean"]

REGULARISE = ("layer", "final", "none")


def head_weights(attention: Tensor) -> Tensor:
    """``mean_i max_j S``, in (0, 1]: ``[H, N, N]`` to ``[H]``."""
    return attention.amax(dim=-1).mean(dim=-1)


def weighted_mean(attention: Tensor, weights: Tensor) -> Tensor:
    """``mean_h S W``: ``[H, R, N]`` and ``[H]`` to ``[R, N]``."""
    return (attention * weights[:, None, None]).mean(dim=0)


def column_factors(length: int) -> Tensor:
    """Float32 ``[N]``: 1 / N for the first column, which all rows see, to 1 for the last."""
    return torch.arange(1, length + 1) / length


def flow_rows(matrices: Sequence[Tensor], rows: Sequence[int], regularise: str = "layer") -> Tensor:
    """
    Rows of the flow after the last layer, by vectors instead of matrices.

    ``F_1 = S_1 D`` and ``F_l = (I + S_l)(I + F_{l-1}) D`` unroll, with ``u_l = u_{l+1} (I + S_l)`` from the row's unit
    vector down, to ``(u_L + (u_{L-1} + ... (u_2 + u_2 S_1 D) D ...) D) D``.

    Parameters
    ----------
    matrices
        Head-weighted means ``[N, N]``, first layer first.
    rows
        Which rows.
    regularise
        ``"layer"``: D after every layer; ``"final"``: once, at the end; ``"none"``: D = I.

    Returns
    -------
    Tensor
        ``[rows, N]``.
    """
    first, *others = matrices
    factors = column_factors(len(first)).to(first)
    each = factors if regularise == "layer" else torch.ones_like(factors)
    vectors = torch.eye(len(first), dtype=first.dtype, device=first.device)[list(rows)]
    passed = []
    for matrix in reversed(others):
        vectors = vectors + vectors @ matrix
        passed.append(vectors)
    flow = (vectors @ first) * each
    for vectors in reversed(passed):
        flow = (vectors + flow) * each
    return flow * factors if regularise == "final" else flow
