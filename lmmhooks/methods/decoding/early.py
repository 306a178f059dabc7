"""What methods share that compare the model's prediction with what its head makes of earlier states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["BUCKETS", "chosen", "early_layers", "mixture_divergence", "within"]

BUCKETS = ("low", "high", "all", "last")

#: Buckets of deeper decoders reach this far from either end (transformers' rule for DoLa).
REACH = 20


def early_layers(bucket: str, family: Any) -> tuple[int, ...]:
    """
    Candidate layers by name, as inputs of decoder layers: 0 is the embedding, ``num_layers`` the normed output.

    Parameters
    ----------
    bucket
        Every second layer of the lower half (``"low"``), of the upper half (``"high"``) or of all with the last one
        where their number is even (``"all"``); or the ``"last"`` one alone. Halves of more than 40 layers are the 20
        at either end. Where head and embedding share their weights, the first two layers are left out: the head would
        only name the words that were read.
    family
        The model family.
    """
    depth = family.num_layers
    first = min(2, depth - 1) if family.ties_embeddings else 0
    half = min(depth // 2, REACH)
    layers = {
        "low": range(first, half, 2),
        "high": range(max(depth - half if depth > 2 * REACH else half, first), depth, 2),
        "all": range(first, depth + 1, 2),
        "last": range(depth, depth + 1),
    }[bucket]
    return tuple(layers) or (first,)


def mixture_divergence(main: Tensor, other: Tensor, keep: Tensor | None = None) -> Tensor:
    """
    ``(mean_v M (log M - log P) + mean_v M (log M - log Q)) / 2`` with ``M = (P + Q) / 2``.

    The release of DoLa calls it a Jensen-Shannon divergence; it differs from one by which distribution the logarithms
    are weighted with, and by the mean over the vocabulary.

    Parameters
    ----------
    main, other
        float32 logits ``[..., vocabulary]`` that broadcast: P and Q are their softmax.
    keep
        Bool that broadcasts to them: the part of the vocabulary that softmax and mean run over; None for all.

    Returns
    -------
    Tensor
        ``[...]``, 0 or more up to rounding.
    """
    if keep is not None:
        main, other = main.masked_fill(~keep, -torch.inf), other.masked_fill(~keep, -torch.inf)
    mixed = (main.softmax(dim=-1) + other.softmax(dim=-1)) / 2
    logs = (main.log_softmax(dim=-1) + other.log_softmax(dim=-1)) / 2
    if keep is None:
        return (torch.xlogy(mixed, mixed) - mixed * logs).mean(dim=-1)
    # Dropped entries are 0 times minus infinity.
    terms = torch.xlogy(mixed, mixed) - mixed * logs.masked_fill(~keep, 0.0)
    return terms.sum(dim=-1) / keep.sum(dim=-1)


def chosen(early: Tensor, layer: Tensor) -> Tensor:
    """Of ``early [layers, B, vocabulary]`` the layer that every row chose (``[B]`` long): ``[B, vocabulary]``."""
    index = layer[None, :, None].expand(1, -1, early.shape[-1])
    return early.gather(0, index)[0]


def within(layers: Sequence[int], family: Any) -> bool:
    """Whether these are inputs of the decoder layers of a model, or its normed output; at least one."""
    return bool(layers) and all(0 <= layer <= family.num_layers for layer in layers)
