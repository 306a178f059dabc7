"""
Layout of a prompt: for every row of a batch, which positions are padding, system text, visual, instruction, generated.

Everything here is index arithmetic on ``input_ids``; what a visual token shows (crop, row, column) is asked of the
model family. A layout is a value: a reduction, a decode step or a stack of branches makes a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .errors import PromptError
from .vision import ImageTokens, VisionInputs

__all__ = ["ImageTokens", "Layout", "Segment", "VisualSpan", "build_layout"]


class Segment(IntEnum):
    """
    What a position of the sequence holds.

    ``SYSTEM`` is the text before the first visual token of its row, ``INSTRUCTION`` the text after it, also between two
    images; a row without images is all instruction. ``GENERATED`` positions were appended by decode steps.
    """

    PADDING = 0
    SYSTEM = 1
    VISUAL = 2
    INSTRUCTION = 3
    GENERATED = 4


@dataclass(frozen=True, eq=False)
class VisualSpan:
    """
    The visual tokens of one image or video in one row.

    Attributes
    ----------
    sample
        Row of the batch.
    image
        Ordinal within the row, images and videos counted together in sequence order.
    source
        Ordinal of the image in the encoder call that produced its features, before beam expansion: rows that repeat a
        prompt share the source.
    modality
        ``"image"`` or ``"video"``; a source is counted per modality.
    positions
        Long ``[n]`` on the CPU, ascending: where the tokens stand in the sequence. Not always contiguous (Qwen3-VL puts
        time stamps between the frames of a video, a reduction leaves gaps).
    tokens
        Their geometry, in the same order.
    """

    sample: int
    image: int
    source: int
    modality: str
    positions: Tensor
    tokens: ImageTokens

    def __len__(self) -> int:
        return self.positions.numel()

    @property
    def start(self) -> int:
        """First position; 0 if nothing of the image is left."""
        return int(self.positions[0]) if len(self) else 0

    @property
    def stop(self) -> int:
        """One past the last position; 0 if nothing of the image is left."""
        return int(self.positions[-1]) + 1 if len(self) else 0


@dataclass(frozen=True, eq=False)
class Layout:
    """
    Where everything is in a batch of prompts.

    Attributes
    ----------
    segment
        int8 ``[B, N]`` of `Segment` values, on the device of ``input_ids``.
    spans
        One `VisualSpan` per image and row, ordered by row and then by position.
    """

    segment: Tensor
    spans: tuple[VisualSpan, ...]

    @property
    def batch(self) -> int:
        """Number of rows B."""
        return self.segment.shape[0]

    @property
    def length(self) -> int:
        """Number of columns N."""
        return self.segment.shape[1]

    @cached_property
    def valid(self) -> Tensor:
        """Bool ``[B, N]``: not padding."""
        return self.segment != Segment.PADDING

    @cached_property
    def visual(self) -> Tensor:
        """Bool ``[B, N]``: visual tokens of any image."""
        return self.segment == Segment.VISUAL

    @cached_property
    def system(self) -> Tensor:
        """Bool ``[B, N]``: text before the first visual token of the row."""
        return self.segment == Segment.SYSTEM

    @cached_property
    def instruction(self) -> Tensor:
        """Bool ``[B, N]``: text after the first visual token of the row, or all text of a row without images."""
        return self.segment == Segment.INSTRUCTION

    @cached_property
    def generated(self) -> Tensor:
        """Bool ``[B, N]``: appended by decode steps."""
        return self.segment == Segment.GENERATED

    @cached_property
    def after_image(self) -> Tensor:
        """Bool ``[B, N]``: text, prompt or generated, that has at least one visual token before it in its row."""
        return (self.visual.cumsum(dim=1) > 0) & self.valid & ~self.visual

    @cached_property
    def after_last_image(self) -> Tensor:
        """Bool ``[B, N]``: text, prompt or generated, that has no visual token after it in its row."""
        return (self.visual.flip(1).cumsum(dim=1).flip(1) == 0) & self.valid

    @cached_property
    def last(self) -> Tensor:
        """Bool ``[B, N]``: the last position of each row that is not padding; nothing in a row of padding only."""
        seen_from_right = self.valid.flip(1).cumsum(dim=1).flip(1)
        return self.valid & (seen_from_right == 1)

    def spans_of(self, sample: int) -> tuple[VisualSpan, ...]:
        """The spans of one row, in sequence order."""
        return tuple(span for span in self.spans if span.sample == sample)

    def gather(self, index: Tensor) -> Layout:
        """
        Layout after a reduction.

        Parameters
        ----------
        index
            Long ``[B, N2]``: the position that each new column holds, -1 for padding; no position twice in a row. Any
            device; an index on an accelerator is brought to the host once, for the spans.

        Returns
        -------
        Layout
            Spans keep the surviving tokens with their new positions, ascending; an image of which nothing is left keeps
            an empty span.

        Raises
        ------
        ValueError
            The index has another number of rows, or points outside the sequence.
        """
        if index.ndim != 2 or index.shape[0] != self.batch:
            raise ValueError(f"index has shape {tuple(index.shape)}; expected [{self.batch}, new length]")
        host = index.cpu()
        if host.numel() and (int(host.min()) < -1 or int(host.max()) >= self.length):
            raise ValueError(
                f"index lies in [{int(host.min())}, {int(host.max())}]; positions of this layout are 0 to "
                f"{self.length - 1}, and -1 stands for padding"
            )
        index = index.to(self.segment.device)
        segment = self.segment.gather(1, index.clamp(min=0)).masked_fill(index < 0, Segment.PADDING)
        # One inverse map per row: old position -> new column, -1 where a position was dropped.
        inverse = torch.full((self.batch, self.length + 1), -1)
        columns = torch.arange(host.shape[1]).expand_as(host)
        inverse.scatter_(1, torch.where(host < 0, self.length, host), columns)
        spans = []
        for span in self.spans:
            moved = inverse[span.sample, span.positions]
            order = moved.argsort(stable=True)
            kept = order[moved[order] >= 0]
            spans.append(replace(span, positions=moved[kept], tokens=span.tokens.subset(kept)))
        return Layout(segment, tuple(spans))

    def extend(self, num_new: int, valid: Tensor | None = None) -> Layout:
        """Layout with ``num_new`` generated columns appended; padding where ``valid [B, num_new]`` is False."""
        if num_new < 0:
            raise ValueError(f"num_new is {num_new}; a sequence grows by 0 or more columns")
        new = self.segment.new_full((self.batch, num_new), Segment.GENERATED)
        if valid is not None:
            new = new.masked_fill(~valid.to(new.device), Segment.PADDING)
        return Layout(torch.cat([self.segment, new], dim=1), self.spans)

    def crop(self, num_gone: int) -> Layout:
        """Layout without its last ``num_gone`` columns, as when a cache is cropped after rejected draft tokens."""
        if not 0 <= num_gone <= self.length:
            raise ValueError(f"num_gone is {num_gone}; this layout has {self.length} columns")
        length = self.length - num_gone
        spans = []
        for span in self.spans:
            left = span.positions < length
            spans.append(replace(span, positions=span.positions[left], tokens=span.tokens.subset(left)))
        return Layout(self.segment[:, :length], tuple(spans))

    def repeat(self, times: int) -> Layout:
        """Layout with every row repeated ``times`` times, sample-major (``[A, A, B, B]``): what beams look like."""
        if times < 1:
            raise ValueError(f"times is {times}; a row is repeated 1 or more times")
        spans = [
            replace(span, sample=sample * times + copy)
            for sample in range(self.batch)
            for copy in range(times)
            for span in self.spans_of(sample)
        ]
        return Layout(self.segment.repeat_interleave(times, dim=0), tuple(spans))

    @staticmethod
    def stack(layouts: Sequence[Layout]) -> Layout:
        """Rows of several layouts in one batch, shorter ones padded on the left: how branches share a forward."""
        if not layouts:
            raise ValueError("stack needs at least one layout")
        length = max(layout.length for layout in layouts)
        segments, spans, offset = [], [], 0
        for layout in layouts:
            shift = length - layout.length
            segments.append(torch.nn.functional.pad(layout.segment, (shift, 0), value=Segment.PADDING))
            spans += [replace(s, sample=s.sample + offset, positions=s.positions + shift) for s in layout.spans]
            offset += layout.batch
        return Layout(torch.cat(segments), tuple(spans))


class _Family(Protocol):
    """What a layout asks of the model family; `lmmhooks.family.Family` in practice."""

    image_token_id: int
    video_token_id: int | None

    def token_counts(self, vision: VisionInputs) -> list[int]: ...

    def group_entries(self, positions: Sequence[Tensor]) -> list[int]: ...

    def image_tokens(self, vision: VisionInputs, source: int, num_tokens: int) -> ImageTokens: ...


def build_layout(
    input_ids: Tensor, attention_mask: Tensor | None, family: _Family, vision: Sequence[VisionInputs]
) -> Layout:
    """
    Layout of a batch of prompts.

    Costs one transfer of ``input_ids`` to the host. Also records on each element of ``vision`` how its entries group
    into images (``entries_per_image``), which some families can only tell from the sequence.

    Parameters
    ----------
    input_ids
        Long ``[B, N]``.
    attention_mask
        ``[B, N]``, or ``[B, past + N]`` of which the last N columns count; 0 marks padding. None: nothing is padding.
        A masked visual token counts as padding and belongs to no span.
    family
        Which token ids stand for visual features and what those features show.
    vision
        The encoder calls whose features go into this prompt, after any beam expansion, at most one per modality.

    Raises
    ------
    PromptError
        The visual tokens of the prompt do not match the features, or the mask is not two-dimensional.
    """
    if input_ids.ndim != 2:
        raise PromptError(f"input_ids has shape {tuple(input_ids.shape)}; a layout needs [batch, length]")
    batch, length = input_ids.shape
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] < length):
        raise PromptError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [{batch}, {length}] with 0 for padding"
        )
    if attention_mask is None:
        coded = input_ids
    else:
        # A masked id i travels as -i - 1, so that ids and mask cost one transfer together.
        valid = attention_mask[:, -length:].to(input_ids.device).bool()
        coded = torch.where(valid, input_ids, -input_ids - 1)
    coded = coded.cpu()
    attended = coded >= 0
    ids = torch.where(attended, coded, -coded - 1)

    spans: list[VisualSpan] = []
    for call in vision:
        spans += _spans_of_call(ids, attended, family, call)
    encoded = {call.modality for call in vision}
    for modality, token_id in (("image", family.image_token_id), ("video", family.video_token_id)):
        if token_id is not None and modality not in encoded and (num := int((ids == token_id).sum())):
            # The model itself would go on, and read the placeholder's embedding where features belong.
            raise PromptError(
                f"the prompt has {num} {modality} tokens, but no {modality} was given; pass the {modality}s too"
            )
    spans = _number_by_position(spans, batch)

    visual = torch.zeros(batch, length, dtype=torch.bool)
    for span in spans:
        visual[span.sample, span.positions] = True
    seen = visual.cumsum(dim=1) > 0
    segment = torch.full((batch, length), Segment.INSTRUCTION, dtype=torch.int8)
    segment[visual.any(dim=1, keepdim=True) & ~seen] = Segment.SYSTEM
    segment[visual] = Segment.VISUAL
    segment[~attended] = Segment.PADDING
    return Layout(segment.to(input_ids.device), tuple(spans))


def _spans_of_call(ids: Tensor, attended: Tensor, family: _Family, call: VisionInputs) -> list[VisualSpan]:
    """Spans of one encoder call: the visual tokens of each row are dealt out to its images by their feature counts."""
    token_id = family.image_token_id if call.modality == "image" else family.video_token_id
    if token_id is None:
        raise PromptError(f"{call.modality} features were given, but this model has no {call.modality} token")
    batch = ids.shape[0]
    where = [(ids[row] == token_id).nonzero().flatten() for row in range(batch)]
    lengths = family.token_counts(call)
    copies = len(lengths) // call.num_entries if call.num_entries else 1
    total = sum(len(positions) for positions in where)
    if total != sum(lengths) or copies * call.num_entries != len(lengths) or batch % max(copies, 1):
        raise _mismatch(call, total, sum(lengths), f"in {batch} rows")

    spans: list[VisualSpan] = []
    per_image: list[int] = []
    cursor = 0
    first_source = 0  # of the row's original sample: beam copies of a row share their sources
    for row, positions in enumerate(where):
        entries: list[Tensor] = []
        taken = 0
        while taken < len(positions):
            n = lengths[cursor + len(entries)]
            if n == 0 or taken + n > len(positions):
                features = sum(lengths[cursor : cursor + len(entries) + 1])
                raise _mismatch(call, len(positions), features, f"in row {row}, whose images end inside the next row's")
            entries.append(positions[taken : taken + n])
            taken += n
        groups = family.group_entries(entries)
        entry = 0
        for offset, size in enumerate(groups):
            place = torch.cat(entries[entry : entry + size])
            entry += size
            tokens = family.image_tokens(call, first_source + offset, len(place))
            seen = attended[row, place]
            if not seen.all():
                place, tokens = place[seen], tokens.subset(seen)
            spans.append(VisualSpan(row, -1, first_source + offset, call.modality, place, tokens))
        cursor += len(entries)
        if (row + 1) % copies == 0:
            per_image += groups
            first_source += len(groups)
    call.entries_per_image = tuple(per_image)
    return spans


def _mismatch(call: VisionInputs, tokens: int, features: int, where: str) -> PromptError:
    return PromptError(
        f"the prompt has {tokens} {call.modality} tokens but its {call.modality}s give {features} features ({where}); "
        f"write one {call.modality} placeholder per {call.modality} and let the model's processor expand it"
    )


def _number_by_position(spans: list[VisualSpan], batch: int) -> list[VisualSpan]:
    """Order spans by row and position, and number them within each row across modalities."""
    ordered = []
    for sample in range(batch):
        # Stable: an image that is masked away entirely has no position and stays where its encoder call put it.
        row = sorted((span for span in spans if span.sample == sample), key=lambda span: span.start)
        ordered += [replace(span, image=image) for image, span in enumerate(row)]
    return ordered
