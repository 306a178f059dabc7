"""
The attention rows that choose the tokens of an answer, read under the model's own backend while it answers.

Row t is the query whose output chooses token t of the answer: the last prompt position for t = 0, later the newest
token. Rows come after the edits of the methods the model is wrapped with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from lmmhooks.engines.probes import DecoderProbe

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["AnswerRow", "AnswerRows"]

Kept = TypeVar("Kept")


@dataclass(frozen=True, eq=False)
class AnswerRow:
    """
    One row of one decoder layer, first sample of the batch, over the N keys it can see.

    Attributes
    ----------
    layer
        0-based.
    weights
        ``[H, N]`` float32 on the model's device; every head sums to 1.
    segment
        Long ``[N]``, CPU: `lmmhooks.layout.Segment` of every key. None where the layer's cache was compressed and its
        entries differ from head to head.
    position
        Long ``[N]``, CPU: place of every key in the prompt as given (``state.layout``); what was generated follows it.
        None like `segment`.
    """

    layer: int
    weights: Tensor
    segment: Tensor | None
    position: Tensor | None


@dataclass
class _Record(Generic[Kept]):
    """One prompt; the state is held, so that its id stays its own."""

    state: PromptState
    steps: list[dict[int, Kept]] = field(default_factory=list)

    def add(self, layer: int, kept: Kept) -> None:
        if not self.steps or layer <= max(self.steps[-1]):
            self.steps.append({})
        self.steps[-1][layer] = kept


class AnswerRows(Generic[Kept]):
    """
    Collects what a function makes of every row.

    Other readings of the prompt (branches of decoding methods, looks ahead) pass the same probes and are told apart by
    the state of their prompt.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    keep
        What to keep of a row; rows themselves are let go.

    Attributes
    ----------
    probes
        For `lmmhooks.engines.runtime.Runtime.probing`.
    """

    def __init__(self, runtime: Runtime, keep: Callable[[AnswerRow, PromptState], Kept]) -> None:
        self.runtime = runtime
        self.keep = keep
        self.probes = [
            DecoderProbe(layer, "last", hears=self._listener(layer), on_decode=True)
            for layer in range(runtime.family.num_layers)
        ]
        self._records: dict[int, _Record[Kept]] = {}

    def steps(self) -> list[dict[int, Kept]]:
        """
        What was kept of the newest prompt, by token of the answer and layer.

        Read it before the probes go: changing what is attached drops the state of the prompt.
        """
        record = self._records.get(id(self.runtime.last_state))
        return [] if record is None else record.steps

    def _listener(self, layer: int) -> Callable[[Tensor, Tensor, Tensor, Edit], None]:
        def hear(weights: Tensor, real: Tensor, rows: Tensor, edit: Edit) -> None:
            chosen = real[0].nonzero().flatten()
            if not len(chosen):
                return
            state = edit.state
            record = self._records.setdefault(id(state), _Record(state))
            row = _seen(layer, weights[0, :, int(chosen[-1])], edit)
            record.add(layer, self.keep(row, state))

        return hear


def _seen(layer: int, weights: Tensor, edit: Edit) -> AnswerRow:
    state, stage = edit.state, edit.stage
    if not state.is_prefill and layer in state.pressed:
        return AnswerRow(layer, weights, None, None)
    segment, position = stage.layout.segment[0].long().cpu(), torch.arange(stage.layout.length)
    if stage.index is not None:
        held = stage.index[0].cpu()
        grown = state.layout.length + torch.arange(stage.layout.length - len(held))
        position = torch.cat([held, grown])
    valid = stage.layout.valid[0].cpu()
    return AnswerRow(layer, weights[:, valid.to(weights.device)], segment[valid], position[valid])
