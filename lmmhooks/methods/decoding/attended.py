"""What methods share that show only some visual tokens to a branch, chosen by attention of the main one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lmmhooks.methods.decoding.view import ImageView

__all__ = ["FILLS", "Fill", "keep_features"]

Fill = Literal["zeros", "ones", "noise"]
FILLS = ("zeros", "ones", "noise")


def keep_features(
    features: tuple[Tensor, ...], keep: Tensor, image: ImageView, fill: Fill = "zeros"
) -> tuple[Tensor, ...]:
    """
    Embeddings of visual tokens with those that are not kept blanked out; their positions stay and are attended to.

    Parameters
    ----------
    features
        Each ``[n, D]``; not changed. Deepstack features of blank tokens are zero whatever the fill.
    keep
        ``[n]`` bool.
    image
        Seeds the noise.
    fill
        What stands in a blank embedding; ``"noise"`` is drawn from a standard normal.
    """
    keep = keep[:, None].to(features[0].device)
    first = features[0]
    if fill == "noise":
        blank = torch.randn(first.shape, generator=image.generator()).to(first)
    else:
        blank = torch.full_like(first, float(fill == "ones"))
    return (torch.where(keep, first, blank), *(layer * keep.to(layer) for layer in features[1:]))
