"""A prompt in several branches: arguments of the forward that reads all of them, and parts of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmmhooks.engines.branch_vision import Entry, with_entries
from lmmhooks.layout import Layout
from lmmhooks.vision import VisionInputs

__all__ = ["StackedPrompt"]


@dataclass(eq=False)
class StackedPrompt:
    """
    Arguments of the forward that reads a prompt in several branches, and what goes with them.

    Attributes
    ----------
    kwargs
        For ``model(**kwargs)``; without cache.
    mask
        ``[N * B, L]`` bool, None when nothing is padded.
    next_position
        ``[..., N * B]`` position of the first token after the prompt.
    layout, vision
        Of the stacked rows.
    entries
        Features of the first block and of all others, by modality.
    outputs
        Encoder outputs that the caller gave, by modality.
    """

    kwargs: dict[str, Any]
    mask: Tensor | None
    next_position: Tensor
    layout: Layout
    vision: list[VisionInputs]
    entries: tuple[Mapping[str, Sequence[Entry]], Mapping[str, Sequence[Entry]]]
    outputs: Mapping[str, Any]

    def split(self, num_rows: int) -> tuple[StackedPrompt, StackedPrompt]:
        """The first block of ``num_rows`` rows, and the others, as wide as both together."""
        first, others = self.entries
        return self._part(slice(0, num_rows), first), self._part(slice(num_rows, None), others)

    def narrowed(self) -> StackedPrompt:
        """Without the columns on the left in which every row is padded."""
        if self.mask is None or not (first := int(self.mask.any(dim=0).to(torch.uint8).argmax())):
            return self
        kwargs, mask = self.kwargs, self.mask[:, first:]
        cut = {
            "input_ids": kwargs["input_ids"][:, first:],
            "attention_mask": mask.long(),
            "position_ids": kwargs["position_ids"][..., first:],
        }
        columns = torch.arange(first, self.layout.length).expand(self.layout.batch, -1)
        return replace(self, kwargs={**kwargs, **cut}, mask=mask, layout=self.layout.gather(columns))

    def _part(self, rows: slice, entries: Mapping[str, Sequence[Entry]]) -> StackedPrompt:
        kwargs, layout = self.kwargs, self.layout
        mask = None if self.mask is None else self.mask[rows]
        kept = {
            "input_ids": kwargs["input_ids"][rows],
            "attention_mask": None if mask is None else mask.long(),
            "position_ids": kwargs["position_ids"][..., rows, :],
            "mm_encoder_outputs": {m: with_entries(self.outputs[m], shown) for m, shown in entries.items() if shown},
        }
        segment = layout.segment[rows]
        spans = (replace(span, sample=span.sample - rows.start) for span in layout.spans)
        return replace(
            self,
            kwargs={**kwargs, **kept},
            mask=mask,
            next_position=self.next_position[..., rows],
            layout=Layout(segment, tuple(span for span in spans if 0 <= span.sample < len(segment))),
        )
