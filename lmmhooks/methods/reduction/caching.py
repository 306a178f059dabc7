"""
Contract of methods that compress keys and values once a prompt has been read.

Shapes: B rows of the batch, H query heads, Hkv key heads, R query rows, N entries a layer holds, K kept and E evicted
ones, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from lmmhooks.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CacheEntries", "CacheMethod", "Pairs"]


@dataclass(frozen=True, eq=False)
class CacheEntries:
    """
    What one decoder layer holds of a batch of prompts when it has just read them.

    Attributes
    ----------
    layer
        0-based.
    keys, values
        ``[B, Hkv, N, d]``, keys after rotary embedding; not to be changed.
    valid, visual
        ``[B, N]`` bool: no padding; visual tokens.
    read
        ``[B, N]`` bool: query rows whose attention was tallied.
    tallies
        What `CacheMethod.tally` returned, summed over the blocks of query rows.
    rows
        Per row of the batch, bool ``[n]`` on the CPU: which of its n tokens are visual, padding left out.
    """

    layer: int
    keys: Tensor
    values: Tensor
    valid: Tensor
    visual: Tensor
    read: Tensor
    tallies: dict[str, Tensor]
    rows: tuple[Tensor, ...]

    @cached_property
    def received(self) -> Tensor:
        """``[B, Hkv, N]`` attention that entries received, summed over rows and over the heads that share a key."""
        return self.tallies["received"].unflatten(1, (self.keys.shape[1], -1)).sum(dim=2)

    def recent(self, counts: Sequence[int]) -> Tensor:
        """``[B, N]`` bool: the last ``counts[b]`` tokens of every row b."""
        remaining = self.valid.flip(1).cumsum(dim=1).flip(1)
        return self.valid & (remaining <= remaining.new_tensor(counts)[:, None])


@dataclass(frozen=True, eq=False)
class Pairs:
    """
    Some keys and values of a layer, in sequence order.

    Attributes
    ----------
    keys, values
        ``[B, Hkv, M, d]``.
    real
        ``[B, M]`` bool: False for fillers, which stand first in rows of the batch that have fewer.
    """

    keys: Tensor
    values: Tensor
    real: Tensor


@dataclass(frozen=True)
class CacheMethod(Method):
    """
    Keeps some entries of every layer's keys and values once the prompt has been read, per key head, and drops the rest.

    The prompt itself is read as by the unpatched model; what follows it attends to what was kept. A method says whose
    attention it scores by (:attr:`rows`, :meth:`tally`), how many entries stay (:meth:`num_keep`), which
    (:meth:`score`) and what is folded into them (:meth:`fold`). Rows of the batch without an image keep everything.
    Entries keep their order and their rotary embedding; tokens that follow are numbered on from the full prompt.
    """

    kind: ClassVar[str] = "reduction"
    needs_all_layers: ClassVar[bool] = False
    """:meth:`num_keep` is asked once for all layers after the last of them, not for each after its own attention."""

    @property
    def rows(self) -> str:
        """
        Prompt rows whose attention is tallied.

        ``"all"``, ``"last"``, ``"after_image"`` (text after the first visual token), or ``"after_last_image+8"``: text
        after the last visual token, and the last 8 rows in any case.
        """
        return "all"

    def tally(self, weights: Tensor, real: Tensor) -> dict[str, Tensor]:
        """
        What is noted of the attention of a block of query rows; sums over all blocks make `CacheEntries.tallies`.

        Parameters
        ----------
        weights
            ``[B, H, R, N]`` float32 after the softmax, 0 at invisible keys; not to be changed.
        real
            ``[B, R]`` bool, False for rows that only fill the block.

        Returns
        -------
        dict
            By name; ``"received"``, ``[B, H, N]`` sums over rows, unless overridden.
        """
        rows = real.to(weights.dtype)[:, None, :, None]
        # A product with the row mask sums rows without a second tensor of the size of the weights.
        return {"received": (weights.transpose(2, 3) @ rows).squeeze(-1)}

    def num_keep(self, layers: Sequence[CacheEntries]) -> list[list[int]]:
        """Entries that stay per key head: for every given layer one number per row of the batch."""
        raise NotImplementedError

    def score(self, entries: CacheEntries, num_keep: Sequence[int]) -> Tensor:
        """
        Rank entries; the lower index wins a tie.

        Parameters
        ----------
        entries
            Of one layer.
        num_keep
            Entries that will stay, per row of the batch.

        Returns
        -------
        Tensor
            ``[B, Hkv, N]`` float32, no NaN; the largest stay, padding is left out by the engine.
        """
        raise NotImplementedError

    def fold(self, kept: Pairs, evicted: Pairs) -> tuple[Tensor, Tensor] | None:
        """
        New keys and values ``[B, Hkv, K, d]`` of the entries that stay, or None when they stay as they are.

        Fillers among the evicted must not contribute; what becomes of fillers among the kept is never seen.
        """
        return None
