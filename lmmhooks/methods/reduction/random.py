"""
Random selection: keep uniformly random visual tokens of every crop.

The control every comparison of reducers must contain: on LLaVA-1.5-7B, UniPruneBench (arXiv 2511.02650) finds it ahead
of six of eight published methods at high reduction. Report the mean over three seeds or more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.base import CropwiseMethod, Scope, TokenGroup

__all__ = ["Random", "random_indices"]


@dataclass(frozen=True)
class Random(CropwiseMethod):
    """Random tokens before the decoder; the same ones for a prompt on every device and in every batch."""

    id: ClassVar[str] = "random"
    paper: ClassVar[str] = "none; control"
    draws: ClassVar[bool] = True

    seed: int = setting(
        0, help="Of the draw. A prompt's tokens depend on it, on the token ids and on the crop, not on the pixels."
    )
    sorted: bool = setting(
        True, help="Raster order for the decoder; False: the order drawn, as UniPruneBench's code does."
    )
    per_crop: bool = setting(True, help="Draw from every crop on its own; False: pool the crops of an image.")

    @property
    def scope(self) -> Scope:
        return "crop" if self.per_crop else "image"

    def select(self, tokens: TokenGroup) -> Tensor:
        index = random_indices(tokens.position.shape[1], tokens.num_keep, tokens.seeds, self.seed)
        return (index.sort(dim=1).values if self.sorted else index).to(tokens.position.device)


def random_indices(num_tokens: int, num_keep: int, streams: Sequence[int], seed: int) -> Tensor:
    """
    Random subsets without repetition, drawn on the CPU so that devices agree.

    Parameters
    ----------
    num_tokens, num_keep
        V and K.
    streams
        One integer per group; equal integers give equal subsets.
    seed
        Any integer.

    Returns
    -------
    Tensor
        ``[G, K]`` long on the CPU, in the order drawn.
    """
    rows = []
    for stream in streams:
        digest = hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.randperm(num_tokens, generator=generator)[:num_keep])
    return torch.stack(rows)
