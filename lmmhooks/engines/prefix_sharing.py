"""
What branches have in common with the main rows is read once: everything up to where their texts part.

Keys and values of a position depend on what stands before it alone, so a branch whose prompt differs from some token on
takes those of the main rows up to there and reads the rest. Both forwards together leave the cache that one forward of
all stacked rows would have left, and everything after the prompt is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lmmhooks.engines.branch_vision import entries_of, with_entries
from lmmhooks.engines.state import PromptState
from lmmhooks.layout import Layout

if TYPE_CHECKING:
    from lmmhooks.engines.branches import StackedPrompt

__all__ = ["SharedPrompt", "can_share", "prefix_cache", "suffix_length"]


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
    num_suffix
        Columns that branches read themselves.
    """

    stacked: StackedPrompt
    num_rows: int
    num_suffix: int

    @classmethod
    def of(cls, stacked: StackedPrompt, num_rows: int, visual_ids: Sequence[int]) -> SharedPrompt | None:
        """How to read a prompt whose branches all show the images as given; None if it is better read at once."""
        input_ids = stacked.kwargs["input_ids"]
        suffix = suffix_length(input_ids, _filled(stacked.mask, input_ids), num_rows, visual_ids)
        return None if suffix is None else cls(stacked, num_rows, suffix)

    @property
    def main(self) -> StackedPrompt:
        """The main rows, as wide as all."""
        kwargs, layout, rows = self.stacked.kwargs, self.stacked.layout, self.num_rows
        blocks = len(kwargs["input_ids"]) // rows
        outputs = {}
        for modality, output in kwargs["mm_encoder_outputs"].items():
            entries = entries_of(output)
            outputs[modality] = with_entries(output, entries[: len(entries) // blocks])
        mask = None if self.stacked.mask is None else self.stacked.mask[:rows]
        kept = {
            "input_ids": kwargs["input_ids"][:rows],
            "attention_mask": None if mask is None else mask.long(),
            "position_ids": kwargs["position_ids"][..., :rows, :],
            "mm_encoder_outputs": outputs,
        }
        spans = tuple(span for span in layout.spans if span.sample < rows)
        return replace(
            self.stacked,
            kwargs={**kwargs, **kept},
            mask=mask,
            next_position=self.stacked.next_position[..., :rows],
            layout=Layout(layout.segment[:rows], spans),
        )

    def suffix(self, main: Cache, empty: DynamicCache) -> tuple[dict[str, Any], DynamicCache, PromptState]:
        """
        The forward of the branches once the main rows were read.

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
        kwargs, rows, num = self.stacked.kwargs, self.num_rows, self.num_suffix
        input_ids, layout = kwargs["input_ids"], self.stacked.layout
        cache = prefix_cache(main, _filled(self.stacked.mask, input_ids), rows, num, empty)
        mask = None if self.stacked.mask is None else self.stacked.mask[rows:]
        spans = tuple(replace(span, sample=span.sample - rows) for span in layout.spans if span.sample >= rows)
        state = PromptState(input_ids[rows:, :-num], None)
        state.read(Layout(layout.segment[rows:], spans).crop(num), None if mask is None else mask[:, :-num])
        forward = {
            "input_ids": input_ids[rows:, -num:],
            "attention_mask": None if mask is None else mask.long(),
            "position_ids": kwargs["position_ids"][..., rows:, -num:],
        }
        return forward, cache, state


def _filled(mask: Tensor | None, input_ids: Tensor) -> Tensor:
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask


def suffix_length(input_ids: Tensor, mask: Tensor, num_rows: int, visual_ids: Sequence[int]) -> int | None:
    """
    How many of the last columns branches have to read themselves.

    Parameters
    ----------
    input_ids, mask
        ``[N * B, L]`` stacked rows, the main ones first, padded on the left.
    num_rows
        Main rows B.
    visual_ids
        Ids that stand for visual features; those have to be in the common part.

    Returns
    -------
    int or None
        At least 1; None if sharing would not spare half of the columns.
    """
    length = input_ids.shape[1]
    starts = _starts(mask)
    columns = torch.arange(length, device=input_ids.device)
    # All rows from their first token on.
    aligned = input_ids.gather(1, (columns + starts[:, None]).clamp(max=length - 1))
    inside = columns < (length - starts)[:, None]
    rows = aligned[num_rows:].unflatten(0, (-1, num_rows))
    within = inside[num_rows:].unflatten(0, (-1, num_rows)) & inside[:num_rows]
    common = ((rows == aligned[:num_rows]) & within).long().cumprod(dim=-1).sum(dim=-1).flatten()
    own = length - starts[num_rows:]
    suffix = (own - torch.minimum(common, own - 1)).max()
    visual = torch.isin(input_ids[num_rows:], torch.tensor(list(visual_ids), device=input_ids.device)) & mask[num_rows:]
    last_visual = length - (visual * (columns + 1)).max()
    num, after_images = torch.stack([suffix, last_visual]).tolist()
    return int(num) if num <= min(after_images, length // 2) else None


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
