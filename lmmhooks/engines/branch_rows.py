"""Rows of a stacked prompt: padding, positions, and the order of its images. Pure functions on tensors and layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lmmhooks.errors import PromptError
from lmmhooks.layout import Layout, VisualSpan
from lmmhooks.vision import VisionInputs

__all__ = [
    "entry_order",
    "grids_of",
    "left_pad",
    "main_rows",
    "position_after",
    "refuse_drafts",
    "replace_images",
    "shift_sources",
    "spans_in_order",
    "tokens_of",
]


def tokens_of(kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``[B, N]`` tokens and bool mask of a forward that reads a prompt."""
    input_ids = kwargs.get("input_ids")
    if input_ids is None:
        raise PromptError(
            "the prompt was given as inputs_embeds, from which no other branch can be made; pass input_ids and pixels"
        )
    mask = kwargs.get("attention_mask")
    if mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PromptError(
            f"attention_mask is {shape}; decoding methods need [batch, length] = {list(input_ids.shape)}, 0 for padding"
        )
    return input_ids, mask.bool()


def refuse_drafts(method: str, logits_to_keep: Any) -> None:
    """Raise PromptError for a prompt of which several positions are asked for: which is its last is not known then."""
    if isinstance(logits_to_keep, Tensor) or logits_to_keep > 1:
        raise PromptError(
            f"logits_to_keep={logits_to_keep!r} asks for several positions of a prompt, so that it is not known which "
            f"is the last token of the prompt, by which {method} chooses; leave it out, and generate without drafts "
            "(prompt_lookup_num_tokens, assistant_model)"
        )


def left_pad(rows: Sequence[Tensor], length: int) -> Tensor:
    """``[B, length]`` from rows ``[n_b]``, zeros on the left."""
    return torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])


def grids_of(kwargs: Mapping[str, Any], layout: Layout, visions: Mapping[str, VisionInputs]) -> dict[str, Tensor]:
    """What positions of images depend on, one row per image of ``layout``, beam copies included."""
    grids = {}
    for modality, vision in visions.items():
        name = f"{modality}_grid_thw"
        if vision.kwargs.get(name) is not None:
            sources = [span.source for span in spans_in_order(layout, modality)]
            grids[name] = vision.kwargs[name][sources]
    if kwargs.get("second_per_grid_ts") is not None:
        grids["second_per_grid_ts"] = kwargs["second_per_grid_ts"]
    return grids


def spans_in_order(layout: Layout, modality: str) -> list[VisualSpan]:
    """Images of all rows in the order of their features."""
    # Sources ascend within a row, whereas an image that is masked away has no position to sort by.
    spans = [span for span in layout.spans if span.modality == modality]
    return sorted(spans, key=lambda span: (span.sample, span.source))


def entry_order(layout: Layout, modality: str, vision: VisionInputs) -> list[int]:
    """Entry of every image of every row, counted before beam expansion."""
    sizes = vision.entries_per_image or ()
    starts = [sum(sizes[:image]) for image in range(len(sizes))]
    return [
        starts[span.source] + offset
        for span in spans_in_order(layout, modality)
        for offset in range(sizes[span.source])
    ]


def shift_sources(layout: Layout, modality: str, shift: int) -> Layout:
    """The layout with the images of a modality counted from ``shift`` on."""
    if not shift:
        return layout
    spans = (replace(s, source=s.source + shift) if s.modality == modality else s for s in layout.spans)
    return Layout(layout.segment, tuple(spans))


def position_after(positions: Tensor, mask: Tensor) -> Tensor:
    """``[..., B]`` position of the token after the prompt; a common one for the axes of an image."""
    last = positions.masked_fill(~mask, -1).amax(dim=-1)
    if last.ndim == 2:
        last = torch.cat([last[:1], last[1:].amax(dim=0, keepdim=True).expand(3, -1)])
    return last + 1


def replace_images(
    input_ids: Tensor,
    mask: Tensor,
    layout: Layout,
    runs: Mapping[tuple[str, int, int], tuple[Tensor, bool]],
    placeholders: Tensor,
    marks: Tensor,
) -> list[Tensor]:
    """
    Rows with something else in the place of their images.

    Parameters
    ----------
    input_ids, mask, layout
        ``[B, N]`` prompts.
    runs
        By modality, row and image: the ids to put there, long ``[k]``, and whether the tokens that open and close the
        image go too.
    placeholders
        Ids that stand for visual features.
    marks
        Ids that open and close an image.

    Returns
    -------
    list of Tensor
        Long ``[n_b]`` without padding; a row without images as it was.
    """
    rows = []
    for sample, (ids, valid) in enumerate(zip(input_ids, mask, strict=True)):
        spans = [span for span in layout.spans_of(sample) if len(span)]
        keep = valid & ~torch.isin(ids, placeholders)
        for span in spans:
            if runs[span.modality, sample, span.source][1]:
                # A video may have marks around each of its frames.
                around = slice(max(span.start - 1, 0), span.stop + 1)
                keep[around] &= ~torch.isin(ids[around], marks)
        pieces, cursor = [], 0
        for span in spans:
            pieces += [ids[cursor : span.start][keep[cursor : span.start]], runs[span.modality, sample, span.source][0]]
            cursor = span.start
        rows.append(torch.cat([*pieces, ids[cursor:][keep[cursor:]]]))
    return rows


def main_rows(output: Any, logits: Tensor, num_rows: int, num_blocks: int) -> Any:
    """
    A model's output with combined logits and the main rows of everything per row.

    Parameters
    ----------
    output
        Of a forward of ``num_blocks`` blocks of rows.
    logits
        ``[B, k, vocabulary]`` to put into it.
    num_rows
        Rows B of a block; the main ones come first.
    num_blocks
        With several, features of images describe all branches and are left out.
    """
    fields = dict(output)
    fields["logits"] = logits
    for name, value in output.items():
        if name in ("image_hidden_states", "video_hidden_states") and num_blocks > 1:
            fields[name] = None
        elif isinstance(value, tuple) and num_blocks > 1:
            fields[name] = tuple(item[:num_rows] if isinstance(item, Tensor) else item for item in value)
        elif name == "rope_deltas" and value is not None:
            fields[name] = value[:num_rows]
    return type(output)(**fields)
