"""Reads the decoder at the newest token, for methods that combine logits with what earlier layers say."""

from __future__ import annotations

from dataclasses import dataclass
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

__all__ = ["StepReader"]


@dataclass
class _Reading:
    """What one forward showed: states ``[rows, n, D]`` and attention ``[rows, H, n, N]`` with values."""

    states: dict[int, Tensor]
    rows: dict[int, tuple[Tensor, Tensor, Any]]


class StepReader:
    """
    Hooks the layers a decoding method reads.

    Attributes
    ----------
    probes
        For the attention engine.
    """

    def __init__(self, runtime: Runtime, method: DecodingMethod) -> None:
        self.runtime = runtime
        self.method = method
        family = runtime.family
        self.layers = sorted({*method.reads(family), *method.reads_image(family)})
        self.images = list(method.reads_image(family))
        self.probes = [
            DecoderProbe(layer, "last", hears=partial(self._hear, layer), on_decode=True)
            for layer in method.reads_attention(family)
        ]
        self._now = _Reading({}, {})

    @property
    def keeps_rows(self) -> bool:
        """Whether something is kept per row from step to step."""
        return bool(self.images) or type(self.method).select_rows is not DecodingMethod.select_rows

    def attach(self, attachments: Attachments) -> None:
        """Hook inputs of decoder layers and the output of the final norm; must come after what shortens sequences."""
        family = self.runtime.family
        for layer in self.layers:
            if layer < family.num_layers:
                hook = partial(self._see_input, layer)
                attachments.pre_hook(family.layers[layer], hook, f"input of decoder layer {layer} (read)")
            else:
                attachments.hook(family.norm, self._see_normed, "final norm (read)")

    def begin(self) -> None:
        """A forward begins."""
        self._now = _Reading({}, {})

    def view(self, rows: int, position: int) -> StepView:
        """
        What was seen at one of the last positions.

        Parameters
        ----------
        rows
            Main rows, the first of the forward.
        position
            Counted from the end: -1 is the newest token.
        """
        family = self.runtime.family
        state = self.runtime.last
        assert state is not None
        visual = state.memory(self).get("visual", {})
        return StepView(
            family=family,
            states={layer: self._now.states[layer][:rows, position] for layer in self.method.reads(family)},
            rows={
                layer: AttentionRow(weights[:rows, :, position], value[:rows], layout)
                for layer, (weights, value, layout) in self._now.rows.items()
            },
            visual={layer: value for layer, value in visual.items() if layer != "mask"},
            is_visual=visual.get("mask"),
            memory=state.memory(self.method),
        )

    def keep_image(self, rows: int) -> None:
        """The prompt was read: keep its visual states, for all steps to come."""
        state = self.runtime.last
        if not self.images or state is None or not state.is_prefill:
            return
        kept: dict[Any, Tensor] = {}
        for layer in self.images:
            stage = state.stages[-1] if layer >= self.runtime.family.num_layers else state.stage_at(layer)
            visual = stage.layout.visual[:rows]
            most = int(visual.sum(dim=1).max())
            # Visual tokens first, in order; the others fill up.
            order = visual.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
            states = self._now.states[layer][:rows]
            order = order.to(states.device)
            kept[layer] = states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))
            kept["mask"] = visual.to(states.device).gather(1, order)
        state.memory(self)["visual"] = kept

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        """The rows of the batch, those of all branches, go on as these."""
        state = self.runtime.last
        assert state is not None
        own = rows[: len(rows) // state.blocks]
        self.method.select_rows(own, state.memory(self.method))
        if kept := memory.get("visual"):
            memory["visual"] = {key: value.index_select(0, own.to(value.device)) for key, value in kept.items()}

    def _see_input(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.runtime.current is not None:
            self._now.states[layer] = args[0] if args else kwargs["hidden_states"]

    def _see_normed(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self.runtime.current is not None:
            self._now.states[self.runtime.family.num_layers] = output

    def _hear(self, layer: int, weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
        if edit.state.is_prefill:
            # One row per sample, wherever it stands among the rows that others asked for.
            own = members.to(weights.dtype)[:, None, None, :]
            weights = own @ weights
        self._now.rows[layer] = weights, edit.values, edit.stage.layout
