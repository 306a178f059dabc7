"""When visual tokens have done their work: rules that decide from one decoder layer whether they may leave."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from lmmhooks.layout import Layout
from lmmhooks.methods.probe import RowsRead

__all__ = ["gate_exits", "gate_features", "image_drift"]


def image_drift(read: RowsRead) -> Tensor:
    """
    How far visual keys move what attention heads read at the planned rows.

    Returns
    -------
    Tensor
        ``[B, N]``, the same number at all positions: ``|o - o_text| / |o|``, mean over heads and summed over the rows,
        where ``o_text`` is the head's output with its softmax restricted to other keys.
    """
    batch, heads, rows, length = read.weights.shape
    value = read.value.float()
    shared = value.shape[1]

    def outputs(weights: Tensor) -> Tensor:
        folded = weights.reshape(batch, shared, heads // shared * rows, length)
        return (folded @ value).view(batch, heads, rows, -1)

    text = read.weights.masked_fill(read.layout.visual[:, None, None], 0)
    full = outputs(read.weights)
    tiny = torch.finfo(torch.float32).tiny
    without = outputs(text / text.sum(dim=-1, keepdim=True).clamp(min=tiny))
    drift = (full - without).norm(dim=-1) / full.norm(dim=-1).clamp(min=tiny)
    return (drift.mean(dim=1) * read.members).sum(dim=1, keepdim=True).expand(-1, length)


def gate_features(hidden: Tensor, layout: Layout) -> Tensor:
    """
    What a learned gate looks at.

    Parameters
    ----------
    hidden
        ``[B, N, D]`` output of a decoder layer.
    layout
        Of it.

    Returns
    -------
    Tensor
        ``[B, 2 D]`` float32: mean of the text behind the last image but for the last token, and the last token.
    """
    last = layout.last
    text = layout.after_last_image & ~last
    masks = torch.stack([text / text.sum(dim=1, keepdim=True).clamp(min=1), last.float()], dim=1)
    return (masks @ hidden.float()).flatten(1)


def gate_exits(features: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """
    Whether a gate says that visual tokens leave.

    Parameters
    ----------
    features
        ``[B, 2 D]``.
    inner, outer
        Weights ``[hidden, 2 D]`` and ``[2, hidden]`` of its two layers, GELU in between; output 1 speaks for leaving.

    Returns
    -------
    Tensor
        ``[B]`` bool.
    """
    keep, leave = (gelu(features @ inner.T) @ outer.T).unbind(dim=-1)
    return leave > keep
