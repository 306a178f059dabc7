"""Reads the decoder at the newest token, for methods that combine logits with what earlier layers say."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.methods.decoding.view import AttentionRow, StepView

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["StepReader"]


@dataclass
class _Reading:
    """What one forward showed of its last positions: states ``[B, k, D]``, and attention rows with their values."""

    num_rows: int = 0
    num_positions: int = 1
    states: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, AttentionRow] = field(default_factory=dict)


class StepReader:
    """
    Hooks the layers a decoding method reads.

    Attributes
    ----------
    probes
        For the attention engine.
    listening
        Set to False while branch rows run by themselves: methods see the main branch.
    """

    def __init__(self, runtime: Runtime, method: DecodingMethod) -> None:
        self.runtime = runtime
        self.method = method
        family = runtime.family
        self.states = list(method.reads(family))
        self.images = list(method.reads_image(family))
        self.probes = [
            DecoderProbe(layer, "last", hears=partial(self._hear, layer), on_decode=True)
            for layer in method.reads_attention(family)
        ]
        self.listening = True
        self._now = _Reading()

    @property
    def reads(self) -> bool:
        """Whether the method looks at more than logits."""
        return bool(self.states or self.images or self.probes)

    @property
    def keeps_rows(self) -> bool:
        """Whether something is kept per row from step to step."""
        return bool(self.images) or type(self.method).select_rows is not DecodingMethod.select_rows

    def attach(self, attachments: Attachments) -> None:
        """Hook inputs of decoder layers and the output of the final norm; must come after what shortens sequences."""
        family = self.runtime.family
        for layer in sorted({*self.states, *self.images}):
            if layer < family.num_layers:
                hook = partial(self._see_input, layer)
                attachments.pre_hook(family.layers[layer], hook, f"input of decoder layer {layer} (read)")
            else:
                attachments.hook(family.norm, self._see_normed, "final norm (read)")

    def begin(self, num_rows: int, num_positions: int) -> None:
        """A forward begins, of which the first rows are the main ones and the last positions are asked for."""
        self._now = _Reading(num_rows, num_positions)

    def end(self) -> None:
        """The step is done: let go of what it showed."""
        self._now = _Reading()

    def view(self, position: int) -> StepView:
        """What was seen at one of the last positions, counted from the end: -1 is the newest token."""
        state = self.runtime.last
        assert state is not None
        visual = state.memory(self).get("visual", {})
        return StepView(
            family=self.runtime.family,
            states={layer: states[:, position] for layer, states in self._now.states.items()},
            rows={layer: self._row(row, position) for layer, row in self._now.rows.items()},
            visual={layer: states for layer, (states, _) in visual.items()},
            is_visual={layer: mask for layer, (_, mask) in visual.items()},
            memory=state.memory(self.method),
            processor=self.runtime.processor,
        )

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        """The rows of the batch, those of all branches, go on as these."""
        state = self.runtime.last
        assert state is not None
        if memory is not state.memory(self):
            return  # rows of branches that keep a cache of their own follow the main ones, which are told first
        own = rows[: len(rows) // state.blocks]
        self.method.select_rows(own, state.memory(self.method))
        for layer, kept in memory.get("visual", {}).items():
            memory["visual"][layer] = tuple(value.index_select(0, own.to(value.device)) for value in kept)

    # -- states --------------------------------------------------------------------------------------------------------

    def _see_input(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(layer, args[0] if args else kwargs["hidden_states"])

    def _see_normed(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._see(self.runtime.family.num_layers, output)

    def _see(self, layer: int, states: Tensor) -> None:
        state = self.runtime.current
        if state is None or not self.listening:
            return
        states = states[: self._now.num_rows]
        if layer in self.states:
            # A copy: a view would keep the states of the whole prompt alive, layer by layer.
            self._now.states[layer] = states[:, -self._now.num_positions :].clone()
        if layer in self.images and state.is_prefill:
            state.memory(self).setdefault("visual", {})[layer] = self._at_image(layer, state, states)

    def _at_image(self, layer: int, state: PromptState, states: Tensor) -> tuple[Tensor, Tensor]:
        """States at visual tokens ``[B, V, D]``, rows with fewer filled up, and which are no fillers."""
        whole = layer == self.runtime.family.num_layers
        stage = state.stages[-1] if whole else state.stage_at(layer)
        if "visual columns" not in stage.scratch:
            visual = stage.layout.visual[: len(states)]
            most = int(visual.sum(dim=1).max())
            # Visual tokens first, in order; the others fill up.
            columns = visual.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
            stage.scratch["visual columns"] = columns, visual.gather(1, columns)
        columns, mask = stage.scratch["visual columns"]
        if whole and stage.index is not None and states.shape[1] == state.layout.length:
            # The final norm sees the whole prompt again, removed tokens with the states they left with.
            columns = stage.index[: len(states)].to(columns.device).gather(1, columns).clamp(min=0)
        columns = columns.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, columns), mask.to(states.device)

    # -- attention -----------------------------------------------------------------------------------------------------

    def _hear(self, layer: int, weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
        if not self.listening:
            return
        if edit.state.is_prefill:
            # One row per sample, wherever it stands among the rows that others asked for, in whichever block of them.
            weights = members.to(weights.dtype)[:, None, None, :] @ weights
            if layer in self._now.rows:
                weights = weights + self._now.rows[layer].weights
        self._now.rows[layer] = AttentionRow(weights, edit.values, edit.stage.layout)

    def _row(self, row: AttentionRow, position: int) -> AttentionRow:
        """The row of one of the last positions, and of the keys only those that were there already."""
        num, later = self._now.num_rows, -1 - position
        keys = row.weights.shape[-1] - later
        return AttentionRow(row.weights[:num, :, position, :keys], row.value[:num, :, :keys], row.layout.crop(later))
