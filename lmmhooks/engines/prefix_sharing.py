"""
What branches have in common with the main rows is read once, and what is shorter is not read as padding.

Keys and values of a position depend on what stands before it alone, so a branch whose prompt differs from some token on
takes those of the main rows up to there and reads the rest. A branch without the image is a tenth as long as the main
rows: it is read by itself, as wide as it is. Either way both forwards together leave the cache that one forward of all
stacked rows would have left, and everything after the prompt is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lmmhooks.engines.state import PromptState

if TYPE_CHECKING:
    from lmmhooks.engines.stacked_prompt import StackedPrompt

__all__ = ["SharedPrompt", "can_share", "columns_to_read", "prefix_cache"]


@dataclass(eq=False)
class SharedPrompt:
    """
    A stacked prompt that is read in two forwards: the main rows, then what is left of the branches.

    Attributes
    ----------
    stacked
        The prompt with all its rows, ``[N * B, L]``.
    num_rows
        Main rows B.
    num_columns
        Columns that branches read themselves.
    behind_main
        Whether they read them behind what they have in common with the main rows, or the whole of their prompts.
    """

    stacked: StackedPrompt
    num_rows: int
    num_columns: int
    behind_main: bool

    @classmethod
    def of(
        cls, stacked: StackedPrompt, num_rows: int, visual_ids: Sequence[int], as_given: Sequence[bool]
    ) -> SharedPrompt | None:
        """
        How to read a prompt; None if it is better read at once.

        Parameters
        ----------
        stacked, num_rows
            The prompt, and how many of its rows are main rows.
        visual_ids
            Ids that stand for visual features.
        as_given
            By branch, whether it shows the images of the main rows.
        """
        input_ids = stacked.kwargs["input_ids"]
        found = columns_to_read(input_ids, _filled(stacked.mask, input_ids), num_rows, visual_ids, as_given)
        return None if found is None else cls(stacked, num_rows, *found)

    @property
    def main(self) -> StackedPrompt:
        """The main rows, as wide as all."""
        return self.stacked.split(self.num_rows)[0]

    @property
    def alone(self) -> StackedPrompt:
        """The branches, as wide as they are themselves."""
        return self.stacked.split(self.num_rows)[1].narrowed()

    @property
    def taken(self) -> Tensor | None:
        """``[N * B]`` tokens that each row does not read itself; None if every row reads its whole prompt."""
        if not self.behind_main:
            return None
        own = _filled(self.stacked.mask, self.stacked.kwargs["input_ids"]).sum(dim=1)
        taken = (own - self.num_columns).clamp(min=0)
        taken[: self.num_rows] = 0
        return taken

    def suffix(self, main: Cache, empty: DynamicCache) -> tuple[dict[str, Any], DynamicCache, PromptState]:
        """
        The forward of the branches once the main rows were read, if they go on behind those.

        Parameters
        ----------
        main
            Cache of the main rows.
        empty
            Cache for the branches.

        Returns
        -------
        kwargs
            Tokens, mask and positions.
        cache
            What they continue.
        state
            What is known of that.
        """
        rows, num = self.num_rows, self.num_columns
        branches = self.stacked.split(rows)[1]
        input_ids, mask = branches.kwargs["input_ids"], branches.mask
        filled = _filled(self.stacked.mask, self.stacked.kwargs["input_ids"])
        cache = prefix_cache(main, filled, rows, num, empty)
        state = PromptState(input_ids[:, :-num], None)
        state.read(branches.layout.crop(num), None if mask is None else mask[:, :-num])
        forward = {
            "input_ids": input_ids[:, -num:],
            "attention_mask": branches.kwargs["attention_mask"],
            "position_ids": branches.kwargs["position_ids"][..., -num:],
        }
        return forward, cache, state


def _filled(mask: Tensor | None, input_ids: Tensor) -> Tensor:
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask


def columns_to_read(
    input_ids: Tensor, mask: Tensor, num_rows: int, visual_ids: Sequence[int], as_given: Sequence[bool]
) -> tuple[int, bool] | None:
    """
    How many of the last columns branches have to read themselves.

    Parameters
    ----------
    input_ids, mask
        ``[N * B, L]`` stacked rows, the main ones first, padded on the left.
    num_rows
        Main rows B.
    visual_ids
        Ids that stand for visual features.
    as_given
        By branch, whether it shows the images of the main rows; a branch that does not has nothing in common with them
        from their first image on.

    Returns
    -------
    tuple or None
        The number, at least 1, and whether they stand behind what can be taken from the main rows, all features
        included, or are the whole prompts of the branches. None if neither would spare half of the columns.
    """
    length = input_ids.shape[1]
    starts = _starts(mask)
    columns = torch.arange(length, device=input_ids.device)
    # All rows from their first token on.
    aligned = input_ids.gather(1, (columns + starts[:, None]).clamp(max=length - 1))
    inside = columns < (length - starts)[:, None]
    visual = torch.isin(aligned, torch.tensor(list(visual_ids), device=input_ids.device)) & inside
    rows = aligned[num_rows:].unflatten(0, (-1, num_rows))
    alike = (rows == aligned[:num_rows]) & inside[num_rows:].unflatten(0, (-1, num_rows)) & inside[:num_rows]
    shown = torch.tensor(list(as_given), device=input_ids.device)[:, None, None]
    alike &= shown | (visual[:num_rows].cumsum(dim=1) == 0)
    common = alike.long().cumprod(dim=-1).sum(dim=-1).flatten()
    own = length - starts[num_rows:]
    suffix = (own - torch.minimum(common, own - 1)).max()
    # Columns behind the last feature of each row; behind the last one of all.
    after_images = (own - (visual[num_rows:] * (columns + 1)).amax(dim=1)).min()
    num, free, widest = torch.stack([suffix, after_images, own.max()]).tolist()
    if num <= min(free, length // 2):
        return int(num), True
    return (int(widest), False) if widest <= length // 2 else None


def can_share(cache: Cache) -> bool:
    """Whether every layer of a cache keeps all keys and values, so that those of a prefix can be taken from it."""
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def prefix_cache(main: Cache, mask: Tensor, num_rows: int, num_suffix: int, empty: DynamicCache) -> DynamicCache:
    """
    What branches have read before their suffixes.

    Parameters
    ----------
    main
        Cache of the main rows, ``[B, H, L, d]`` per layer.
    mask
        ``[N * B, L]`` of all stacked rows.
    num_rows, num_suffix
        Main rows B; columns that branches read themselves.
    empty
        Cache to fill.

    Returns
    -------
    DynamicCache
        ``[(N - 1) * B, H, L - num_suffix, d]`` per layer.
    """
    starts = _starts(mask)
    own, theirs = starts[num_rows:], starts[:num_rows].repeat(len(mask) // num_rows - 1)
    columns = torch.arange(mask.shape[1] - num_suffix, device=mask.device)
    # The same token stands elsewhere in a row of another length; what comes before the first token is never looked at.
    place = (columns + (theirs - own)[:, None]).clamp(0, mask.shape[1] - 1)
    row = torch.arange(num_rows, device=mask.device).repeat(len(mask) // num_rows - 1)
    for index, layer in enumerate(main.layers):
        keys, values = layer.keys, layer.values
        rows, places = row.to(keys.device)[:, None], place.to(keys.device)
        # Indexing rows and columns at once puts heads last but one: [rows, columns, H, d].
        empty.update(
            keys.transpose(1, 2)[rows, places].transpose(1, 2),
            values.transpose(1, 2)[rows, places].transpose(1, 2),
            index,
        )
    return empty


def _starts(mask: Tensor) -> Tensor:
    """``[rows]`` column of the first token of rows that are padded on the left."""
    return mask.shape[1] - mask.sum(dim=1)
