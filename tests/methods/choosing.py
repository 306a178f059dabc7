"""A reducer before the decoder against a choice written down for lists of tokens, on a whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.family import resolve
from tests.reference.reduction import keep_only, reduced_logits
from tests.zoo import Zoo, build

# float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5
STEPS = 3
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")


@dataclass
class Candidates:
    """
    Visual tokens that are reduced together.

    Attributes
    ----------
    row
        Of the batch.
    numbers
        Of the tokens in their row, padding not counted.
    cell_rows, cell_cols
        Their cells.
    states
        ``[V, D]`` what enters the decoder.
    probes
        What the method read of the tower, by signal, ``[V, ...]``.
    everything
        ``[N, D]`` states of the row, padding left out.
    layout
        Of the batch.
    valid
        ``[N]`` positions of the row that are no padding.
    """

    row: int
    numbers: list[int]
    cell_rows: list[int]
    cell_cols: list[int]
    states: Tensor
    probes: dict[str, Tensor]
    everything: Tensor
    layout: Any
    valid: Tensor


#: (candidates) -> tokens that stay, local, in order, each with a new state or None
Naive = Callable[[Candidates], Sequence[tuple[int, "Tensor | None"]]]


def plain(chosen: Sequence[int], *, ascending: bool = True) -> list[tuple[int, Tensor | None]]:
    """Tokens that stay as they are."""
    return [(i, None) for i in (sorted(chosen) if ascending else chosen)]


def compare(
    family: str,
    method: Any,
    naive: Naive,
    *,
    by_crop: bool,
    images: Sequence[int] = (2, 1),
    processor: Any = None,
    with_newlines: bool = False,
) -> None:
    """Prefill logits at every position, and logits of the steps after, of a padded batch against single rows."""
    zoo, eager = build(family), build(family, attn="eager")
    inputs = zoo.inputs(batch=len(images), images=list(images))
    with lmmhooks.wrap(zoo.model, method, processor=processor):
        with torch.no_grad():
            logits = zoo.model(**inputs).logits
            state = find_runtime(zoo.model).last
        out = zoo.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    with torch.no_grad():
        unpatched = zoo.model(**inputs).logits
    assert (logits[:, -1] - unpatched[:, -1]).abs().max() > 1e-2, "a reduction that changes nothing proves nothing"
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    readings = {
        str(key).partition("[")[0]: value
        for memory in state._memory.values()
        for key, value in memory.items()
        if str(key).startswith("vision_")
    }
    for row in range(len(images)):
        choose = _choose(naive, state.layout, row, readings, by_crop, with_newlines)
        cuts = {0: (choose, not resolve(zoo.model).mrope)}
        valid = inputs["attention_mask"][row].bool()
        expected = reduced_logits(eager.model, inputs, row, cuts)
        torch.testing.assert_close(logits[row, valid], expected, atol=TOLERANCE, rtol=0)
        steps = reduced_logits(eager.model, inputs, row, cuts, answer[:, :-1])[-STEPS:]
        torch.testing.assert_close(torch.stack(out.logits, dim=1)[row], steps, atol=TOLERANCE, rtol=0)


def _choose(
    naive: Naive, layout: Any, row: int, readings: dict[str, Tensor], by_crop: bool, with_newlines: bool
) -> Any:
    number = layout.valid[row].long().cumsum(dim=0) - 1

    def choose(alive: list[Any], attention: Any, prompt: int) -> list[Any]:
        everything = torch.stack([token.state for token in alive])
        tokens_of = {token.number: token for token in alive}
        for span in layout.spans_of(row):
            tokens = span.tokens
            crops = tokens.crop.unique().tolist()
            parts = [tokens.crop == crop for crop in crops if crop >= 0] if by_crop else [tokens.crop >= 0]
            if with_newlines:
                parts = [torch.ones(len(span), dtype=torch.bool)]
            else:
                newlines = number[span.positions[tokens.crop < 0]].tolist()
                alive = keep_only(set(newlines), [])(alive, attention, prompt)
            for part in parts:
                place = span.positions[part]
                numbers = number[place].tolist()
                group = Candidates(
                    row=row,
                    numbers=numbers,
                    cell_rows=tokens.row[part].tolist(),
                    cell_cols=tokens.col[part].tolist(),
                    states=everything[numbers],
                    probes={name: value[row, place] for name, value in readings.items()},
                    everything=everything[:prompt],
                    layout=layout,
                    valid=layout.valid[row],
                )
                chosen = naive(group)
                for local, state in chosen:
                    if state is not None:
                        tokens_of[numbers[local]].state = state
                alive = keep_only(set(numbers), [numbers[local] for local, _ in chosen])(alive, attention, prompt)
        return alive

    return choose


def prompt_state(zoo: Zoo, inputs: dict[str, Tensor], *methods: Any, processor: Any = None) -> Any:
    """State of the prompt after one forward."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, *methods, processor=processor):
        zoo.model(**inputs)
        return find_runtime(zoo.model).last
