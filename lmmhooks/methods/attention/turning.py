"""Turning states towards a direction without changing their length, which steering methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import normalize

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["turn"]


def turn(states: Tensor, direction: Tensor, strength: float | Tensor) -> Tensor:
    """
    ``||x|| * unit(unit(x) + strength * direction)``.

    Parameters
    ----------
    states
        ``[..., D]``, any floating dtype.
    direction
        Unit vectors, broadcastable to ``states``; zeros leave a state where it is, up to rounding.
    strength
        Length of what is added, one number or broadcastable to ``[..., 1]``.

    Returns
    -------
    Tensor
        Shape of ``states``, float32.
    """
    states = states.float()
    return states.norm(dim=-1, keepdim=True) * normalize(normalize(states, dim=-1) + strength * direction, dim=-1)
