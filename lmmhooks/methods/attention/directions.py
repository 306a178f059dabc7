"""Steering directions from the shifts of hidden states that were seen on demonstrations (`vti`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["principal_shift", "textual_direction", "visual_direction"]


def principal_shift(differences: Tensor) -> Tensor:
    """
    Mean of some shifts plus their first principal component, which has unit length.

    Parameters
    ----------
    differences
        ``[n, F]``, one shift per demonstration.

    Returns
    -------
    Tensor
        ``[F]`` float32. Where all shifts are equal there is no component, and the result is their mean.
    """
    x = differences.float()
    mean = x.mean(dim=0)
    u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
    # Rounding alone leaves singular values of about 1e-7 of the data.
    if s[0] <= 1e-6 * x.norm():
        return mean
    # Of the two signs the one that makes the largest entry of the left vector positive.
    return mean + u[:, 0][u[:, 0].abs().argmax()].sign() * vh[0]


def textual_direction(differences: Tensor) -> Tensor:
    """
    One direction per decoder layer from ``[n, L + 1, D]``: correct minus hallucinated, embeddings first.

    All layers form one group of the principal component; the entry of the embeddings is dropped: ``[L, D]``.
    """
    return principal_shift(differences.flatten(1)).view(differences.shape[1:])[1:]


def visual_direction(differences: Tensor, grouping: Literal["released", "token"] = "released") -> Tensor:
    """
    One direction per vision layer and token from ``[n, L + 1, T, D]``: masked minus clean, embeddings first.

    Parameters
    ----------
    differences
        Shifts per demonstration; ``T`` is 1 where they were averaged over tokens.
    grouping
        What forms one group of the principal component. ``"token"``: a token's values in all layers. ``"released"``:
        as many groups, but contiguous pieces of the flattened ``[L + 1, T, D]``, because the released code reshapes
        without permuting.

    Returns
    -------
    Tensor
        ``[L, T, D]``.
    """
    num, layers, tokens, width = differences.shape
    if grouping == "token":
        groups = differences.transpose(1, 2).reshape(num, tokens, -1)
        shifts = torch.stack([principal_shift(groups[:, i]) for i in range(tokens)])
        return shifts.view(tokens, layers, width).transpose(0, 1)[1:]
    groups = differences.reshape(num, tokens, -1)
    return torch.stack([principal_shift(groups[:, i]) for i in range(tokens)]).view(layers, tokens, width)[1:]
