"""Images inserted into an answer the slow way: the whole sequence is written down and read at once, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from tests.reference.attention import positions_of


@dataclass
class Column:
    """One token: embedding, position per axis, features that decoder layers add to it."""

    state: Tensor
    position: tuple[int, ...]
    deepstack: list[Tensor]


@torch.no_grad()
def injected_logits(
    model: Any, one: dict[str, Any], answer: Tensor, at: Sequence[int], bridge: Sequence[int], window: int
) -> Tensor:
    """
    Logits ``[t, vocabulary]`` that chose an answer with images in it.

    Parameters
    ----------
    model, one
        Model and prompt that stands alone, without padding.
    answer
        ``[t]``.
    at
        After how many generated tokens the images are inserted.
    bridge
        Token ids before them.
    window
        Side of the pooling window.
    """
    text, config = model.model.language_model, model.config
    columns, images = _prompt(model, one, window)
    axes = len(columns[0].position)
    table = model.get_input_embeddings()

    def write(token: int) -> None:
        place = max(max(column.position) for column in columns) + 1
        columns.append(Column(table(torch.tensor(token)), (place,) * axes, []))

    asked = [len(columns) - 1]
    for number, token in enumerate(answer[:-1].tolist(), start=1):
        write(token)
        if number in at:
            for word in bridge:
                write(word)
            for image in images:
                if hasattr(config, "vision_start_token_id"):
                    write(config.vision_start_token_id)
                place = max(max(column.position) for column in columns) + 1
                for ordinal, (row, col, state, deepstack) in enumerate(image):
                    position = (place, place + row, place + col) if axes == 3 else (place + ordinal,)
                    columns.append(Column(state, position, deepstack))
                if hasattr(config, "vision_end_token_id"):
                    write(config.vision_end_token_id)
        asked.append(len(columns) - 1)
    positions = torch.tensor([column.position for column in columns]).T
    kwargs: dict[str, Any] = {"position_ids": positions[:, None] if axes == 3 else positions}
    if any(column.deepstack for column in columns):
        kwargs["visual_pos_masks"] = torch.tensor([[bool(column.deepstack) for column in columns]])
        shown = [column.deepstack for column in columns if column.deepstack]
        kwargs["deepstack_visual_embeds"] = [torch.stack(parts) for parts in zip(*shown, strict=True)]
    embeds = torch.stack([column.state for column in columns])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    hidden = text(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **kwargs).last_hidden_state
    return model.lm_head(hidden[0, asked])


def _prompt(model: Any, one: dict[str, Any], window: int) -> tuple[list[Column], list[list[tuple[Any, ...]]]]:
    """Columns of the prompt, and every image as ``(row, col, state, deepstack)`` of its pooled cells."""
    inputs, seen = dict(one), {}
    if (positions := positions_of(model, inputs)) is not None:
        inputs["position_ids"] = positions
    with lmmhooks.wrap(model, "reduction-identity"):
        # First, because the identity takes deepstack features into its own hands.
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True, prepend=True
        )
        model(**inputs, use_cache=False)
        hook.remove()
        layout = find_runtime(model).last.layout
    positions = seen["position_ids"]
    positions = positions[-3:, 0] if positions.ndim == 3 else positions
    visual = seen.get("visual_pos_masks")
    features = seen.get("deepstack_visual_embeds") or []
    columns = []
    for place in range(seen["inputs_embeds"].shape[1]):
        extra = []
        if visual is not None and visual[0, place]:
            extra = [feature[int(visual[0, :place].sum())] for feature in features]
        position = tuple(int(axis[place]) for axis in positions)
        columns.append(Column(seen["inputs_embeds"][0, place], position, extra))
    return columns, [_pool(span, columns, window) for span in layout.spans]


def _pool(span: Any, columns: list[Column], window: int) -> list[tuple[Any, ...]]:
    out = []
    for crop in range(len(span.tokens.grids)):
        members = [i for i in range(len(span)) if span.tokens.crop[i] == crop]
        if not members:
            continue
        top = min(int(span.tokens.row[i]) for i in members)
        left = min(int(span.tokens.col[i]) for i in members)
        cells: dict[tuple[int, int], list[Column]] = {}
        for i in members:
            cell = (int(span.tokens.row[i]) - top) // window, (int(span.tokens.col[i]) - left) // window
            cells.setdefault(cell, []).append(columns[int(span.positions[i])])
        for (row, col), found in sorted(cells.items()):
            state = sum(column.state for column in found) / len(found)
            layers = zip(*(column.deepstack for column in found), strict=True)
            out.append((row, col, state, [sum(parts) / len(found) for parts in layers]))
    return out
