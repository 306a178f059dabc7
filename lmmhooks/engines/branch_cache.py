"""A key/value cache whose rows are several branches of one batch, and what decode steps need to know of those rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from lmmhooks.errors import PromptError

__all__ = ["BranchCache", "Follower", "refuse_static"]


class Follower(Protocol):
    """Something whose rows go with those of a cache."""

    def select(self, rows: Tensor) -> None:
        """Go on with these of the B rows."""

    def crop(self, num_gone: int) -> None:
        """Forget as many entries from the end."""


def refuse_static(cache: Cache) -> None:
    """Raise PromptError for a cache that was allocated for the rows of the caller."""
    if cache.is_compileable:
        raise PromptError(
            f"decoding methods keep a block of rows per branch, for which {type(cache).__name__} has no room; "
            "leave cache_implementation and past_key_values out, so that the default dynamic cache is used"
        )


class BranchCache(DynamicCache):
    """
    View of the cache that ``generate`` made, with the rows of branch j at ``[j * B, (j + 1) * B)``.

    ``generate`` reorders, repeats and crops it as if it had B rows; every operation acts on all branches alike. Layers
    are shared with the original cache, so a caller who holds that one sees the same keys and values.

    Parameters
    ----------
    inner
        The cache to view; dynamic.
    num_branches
        Blocks of rows.
    mask
        ``[num_branches * B, L]`` bool padding mask of the prompt, None when nothing is padded.
    next_position
        ``[..., num_branches * B]`` position of the first token after the prompt, axes first where there are several.

    Raises
    ------
    PromptError
        For a static cache, which has no room for branches.
    """

    def __init__(self, inner: Cache, num_branches: int, mask: Tensor | None, next_position: Tensor) -> None:
        refuse_static(inner)
        super().__init__(offloading=inner.offloading, offload_only_non_sliding=getattr(inner, "only_non_sliding", True))
        self.layers = inner.layers
        self.layer_class_to_replicate = inner.layer_class_to_replicate
        self.num_branches = num_branches
        self.mask = mask
        self.next_position = next_position
        self.prompt_length: int | None = None
        """Entries of the first layer once the prompt was read: fewer than its tokens where a reducer acts there."""
        self.follower: Follower | None = None
        """Told what happens to the rows, after the cache itself did it."""
        self.on_select: Callable[[Tensor], None] | None = None
        """Told which rows of all branches go on."""

    def prompt_read(self) -> None:
        """The prompt is in the cache; what enters from now on continues it."""
        self.prompt_length = self.get_seq_length()

    def continuation(self, num_new: int) -> tuple[Tensor | None, Tensor]:
        """
        Mask and positions of a forward that continues the prompt.

        Parameters
        ----------
        num_new
            Tokens per row in the coming forward.

        Returns
        -------
        mask
            ``[num_branches * B, L + tokens so far + num_new]`` long, or None.
        positions
            ``[..., num_branches * B, num_new]``.
        """
        assert self.prompt_length is not None
        grown = self.get_seq_length() - self.prompt_length
        steps = torch.arange(grown, grown + num_new, device=self.next_position.device)
        positions = self.next_position[..., None] + steps
        if self.mask is None:
            return None, positions
        new = self.mask.new_ones(self.mask.shape[0], grown + num_new)
        return torch.cat([self.mask, new], dim=1).long(), positions

    def append(self, branches: BranchCache) -> None:
        """
        Take in branches that read their prompt after the rows of this cache, which held the main branch alone.

        The layers stay those of the cache that is viewed, so that whoever holds it sees all rows. Shorter branches are
        filled up on the left; masking that is up to the caller.
        """
        for own, other in zip(self.layers, branches.layers, strict=True):
            fill = (0, 0, own.keys.shape[2] - other.keys.shape[2], 0)
            own.keys = torch.cat([own.keys, torch.nn.functional.pad(other.keys, fill)])
            own.values = torch.cat([own.values, torch.nn.functional.pad(other.values, fill)])
        rows = branches._num_rows
        positions = branches.next_position
        self.next_position = torch.cat([positions[..., :rows], positions], dim=-1)
        self.mask = None if branches.mask is None else torch.cat([branches.mask[:rows], branches.mask])
        self.num_branches = 1 + branches.num_branches
        self.follower = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self._in_every_branch(beam_idx))
        self._follow(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self._in_every_branch(indices))
        self._follow(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        # Rows stay grouped by branch when each of them is repeated in place.
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(self._num_rows, device=self.next_position.device)
        self._follow(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        if self.follower is not None:
            self.follower.crop(before - self.get_seq_length())

    @property
    def _num_rows(self) -> int:
        return self.next_position.shape[-1] // self.num_branches

    def _in_every_branch(self, rows: Tensor) -> Tensor:
        starts = torch.arange(self.num_branches, device=rows.device) * self._num_rows
        return (starts[:, None] + rows.long()).flatten()

    def _follow(self, rows: Tensor) -> None:
        index = self._in_every_branch(rows).to(self.next_position.device)
        self.next_position = self.next_position.index_select(-1, index)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, index)
        if self.on_select is not None:
            self.on_select(index)
        if self.follower is not None:
            self.follower.select(rows)
