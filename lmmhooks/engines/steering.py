"""Runs steering methods: hooks on MLPs, on the outputs of decoder layers and on the final norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.passes import beside
from lmmhooks.errors import ModelError
from lmmhooks.methods.attention.steering import SteeringContext, SteeringMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState, Stage

__all__ = ["SteeringEngine"]


class SteeringEngine:
    """Attaches the steps of all steering methods of a model, in the order in which the methods were given."""

    def __init__(self, runtime: Runtime, methods: Sequence[SteeringMethod]) -> None:
        self.runtime = runtime
        self.methods = methods

    def attach(self, attachments: Attachments) -> None:
        """Hook what the methods act on; nothing else is touched."""
        family = self.runtime.family
        for method in self.methods:
            if "edit_vision_mlp" in method.steps:
                for layer in method.vision_layers(family):
                    module = family.mlp_of(family.vision_layers[layer])
                    attachments.hook(module, partial(self._vision_mlp, method, layer), f"MLP of vision layer {layer}")
            if "edit_mlp" in method.steps:
                for layer in method.layers(family):
                    module = family.mlp_of(family.layers[layer])
                    attachments.hook(module, partial(self._mlp, method, layer), f"MLP of decoder layer {layer}")
            if "read_layer" in method.steps:
                for layer in method.read_layers(family):
                    reader = partial(self._layer, method, layer)
                    attachments.hook(family.layers[layer], reader, f"output of decoder layer {layer}")
            if "mix_output" in method.steps:
                attachments.hook(family.norm, partial(self._output, method), "final norm")

    def _vision_mlp(
        self, method: SteeringMethod, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        return method.edit_vision_mlp(output, layer, self.runtime.family)

    def _mlp(
        self, method: SteeringMethod, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        if self.runtime.current is None:
            return None
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise ModelError(
                f"{type(module).__name__} in decoder layer {layer} returns {_kind(output)} where steering needs states "
                f"[batch, length, width]; {method.id} cannot run on {type(self.runtime.family.model).__name__}"
            )
        # With accelerate, inputs reach the right device only inside the module's forward.
        inputs = (args[0] if args else next(iter(kwargs.values()))).to(output.device)
        return method.edit_mlp(inputs, output, self._context(method, layer, output))

    def _layer(
        self, method: SteeringMethod, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        if self.runtime.current is not None:
            method.read_layer(output, self._context(method, layer, output))

    def _output(self, method: SteeringMethod, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        if self.runtime.current is None:
            return None
        return method.mix_output(output, self._context(method, self.runtime.family.num_layers, output))

    def _context(self, method: SteeringMethod, layer: int, states: Tensor) -> SteeringContext:
        state = self.runtime.current
        assert state is not None
        # The final norm sees the whole prompt again, as its first stage did.
        whole = layer == self.runtime.family.num_layers and state.is_prefill
        layout = state.layout if whole else state.stage_at(layer).layout
        length = states.shape[1]
        valid = layout.valid[:, layout.length - length :]
        last = layout.last[:, layout.length - length :].int().argmax(dim=1, keepdim=True)
        return SteeringContext(
            layer=layer,
            family=self.runtime.family,
            valid=valid,
            last=last,
            is_prefill=state.is_prefill,
            memory=state.memory(method),
            logits=self._logits,
            spread=_spreader(state, None if whole else state.stage_at(layer)),
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        family = self.runtime.family
        # forward, not __call__: the hooks on the norm belong to the decoder's own output.
        normed = family.norm.forward(beside(hidden, family.norm))
        return family.lm_head(beside(normed, family.lm_head)).float().to(hidden.device)


def _kind(output: Any) -> str:
    return f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def _spreader(state: PromptState, stage: Stage | None) -> Callable[[Tensor, Tensor], Tensor]:
    def spread(states: Tensor, onto: Tensor) -> Tensor:
        if stage is None or stage.index is None or not state.is_prefill:
            return states.to(onto)
        # One column more than the prompt takes what padding writes.
        room = torch.cat([onto, onto[:, :1]], dim=1)
        index = stage.index.to(onto.device)
        index = index.masked_fill(index < 0, onto.shape[1])[..., None].expand(-1, -1, onto.shape[-1])
        return room.scatter(1, index, states.to(onto))[:, :-1]

    return spread
