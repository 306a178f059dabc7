"""
Runs reducers inside the vision tower, with hooks only: layers behind a reduction see fewer tokens.

A layer computes ``x = x + attention(norm1(x))`` and ``x + mlp(norm2(x))``. The input of norm2 is the one place between
both where tokens can leave, but the residual that the layer adds in the end is still the long one. The sum is therefore
taken here, of the reduced residual and what the MLP makes of it; the layer is left with its own residual plus zero,
which is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import AttentionCall, AttentionResult, Port, route
from lmmhooks.errors import ModelError, PromptError
from lmmhooks.methods.reduction.tower import TowerMethod, TowerStep, TowerTokens

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["TowerEngine"]

#: Backends whose own function takes an additive mask.
_DENSE_BACKENDS = ("sdpa", "eager")


@dataclass(eq=False)
class _Run:
    """
    One pass of crops through the tower.

    Attributes
    ----------
    num_slots
        Tokens of a crop before any reduction.
    origin, valid
        As in `TowerStep`, of the tokens that are left.
    slots
        ``[G, num_slots + 1, C]``: the state every token had when it left; one slot more takes what padding writes.
        None until the first reduction.
    bias
        ``[G, 1, 1, t]`` float32 for the attention logits of all later layers.
    call
        Attention call of the layer that is running.
    reduced, output
        Residual stream of that layer after its reduction, and the layer's output if it had one.
    memory
        Of the method.
    """

    num_slots: int
    origin: Tensor
    valid: Tensor | None = None
    slots: Tensor | None = None
    bias: Tensor | None = None
    call: AttentionCall | None = None
    reduced: Tensor | None = None
    output: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, states: Tensor) -> _Run:
        crops, length, _ = states.shape
        return cls(length, torch.arange(length, device=states.device).expand(crops, -1))

    def put_away(self, states: Tensor) -> None:
        """Note the states of all tokens that are left, before some of them leave."""
        if self.slots is None:
            self.slots = states.new_empty(states.shape[0], self.num_slots + 1, states.shape[2])
        self.slots.scatter_(1, self.origin[..., None].expand_as(states), states)

    def follow(self, step: TowerStep) -> None:
        """The tokens of a step are those that are left."""
        self.origin, self.valid = step.origin, step.valid
        bias = None if step.weight is None else step.weight.log()
        if step.valid is not None:
            bias = torch.zeros_like(step.valid, dtype=torch.float32) if bias is None else bias
            bias = bias.masked_fill(~step.valid, torch.finfo(torch.float32).min)
        self.bias = None if bias is None else bias[:, None, None]

    def kept(self) -> Tensor:
        """``[G, num_slots]`` float32, 1 for slots at which a token is left."""
        kept = torch.zeros(self.origin.shape[0], self.num_slots + 1, device=self.origin.device)
        return kept.scatter_(1, self.origin, 1.0)[:, :-1]


class TowerEngine:
    """
    Attaches the reducer that acts inside the vision tower of a model.

    Raises
    ------
    ModelError
        During a forward, if the tower masks attention: its mask would not fit fewer tokens.
    PromptError
        During a forward with videos.
    """

    def __init__(self, runtime: Runtime, method: TowerMethod) -> None:
        self.runtime = runtime
        self.method = method
        self.layers = sorted(method.tower_layers(runtime.family))
        self.last = runtime.family.feature_layer
        (self.probe,) = method.probes(runtime.family)
        self.run: _Run | None = None

    def attach(self, attachments: Attachments) -> None:
        """Hook the vision layers between the first reduction and the projector; comes after all other engines."""
        family = self.runtime.family
        reached = range(self.layers[0], self.last + 1)
        layers = {index: family.vision_layers[index] for index in reached}
        attachments.pre_hook(layers[reached[0]], self._begin, f"input of vision layer {reached[0]} (tower)")
        modules = {index: family.attention_of(layer) for index, layer in layers.items()}
        route(attachments, [module.config for module in modules.values()])
        for index, module in modules.items():
            attachments.pre_hook(module, Port(self._attend), f"attention of vision layer {index} (tower)")
        for index in self.layers:
            if self.method.after == "attention":
                norm, mlp = family.mlp_norm_of(layers[index]), family.mlp_of(layers[index])
                attachments.pre_hook(norm, partial(self._between, index), f"second norm of vision layer {index}")
                # Behind hooks that change what the MLP returns: they must see it, not the zero that takes its place.
                attachments.hook(mlp, self._after_mlp, f"MLP of vision layer {index} (tower)")
        for index in sorted({*self.layers, self.last}):
            # Before the hooks by which transformers records hidden states: they are what the projector takes.
            hook = partial(self._leave, index)
            attachments.hook(layers[index], hook, f"output of vision layer {index} (tower)", first=True)
        if hasattr(family.core, "get_video_features"):
            attachments.attribute(family.core, "get_video_features", self._refuse_video, "core.get_video_features")

    # -- one layer ----------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.run = _Run.of(args[0] if args else kwargs["hidden_states"])

    def _attend(self, call: AttentionCall) -> AttentionResult:
        run = self.run
        assert run is not None
        run.call = call
        if call.mask is not None:
            raise ModelError(
                f"the vision tower of {self.runtime.family.name} masks attention, and the mask would not fit after "
                f"{self.method.id} removed tokens; use a method that reduces behind the tower"
            )
        if run.bias is None:
            return call.run_base()
        bias = run.bias.to(call.query.dtype)
        if call.backend in _DENSE_BACKENDS:
            return call.base(call.query, call.key, call.value, bias)
        # Flash kernels take no bias per key.
        out = nn.functional.scaled_dot_product_attention(
            call.query, call.key, call.value, attn_mask=bias, scale=call.scaling
        )
        return out.transpose(1, 2).contiguous(), None

    def _between(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.run is not None
        states = args[0] if args else next(iter(kwargs.values()))
        step = self._reduce(layer, states)
        if step is None:
            return None
        self.run.reduced = step.states
        return (step.states,), {}

    def _after_mlp(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        assert self.run is not None
        if self.run.reduced is None:
            return None
        self.run.output = self.run.reduced + output
        self.run.reduced = None
        return output.new_zeros(())

    def _leave(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run = self.run
        assert run is not None
        states = output[0] if isinstance(output, tuple) else output
        if run.output is not None:
            states, run.output = run.output, None
        elif self.method.after == "layer" and layer in self.layers:
            step = self._reduce(layer, states)
            states = states if step is None else step.states
        run.call = None
        if layer == self.last:
            states = self._restore(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _reduce(self, layer: int, states: Tensor) -> TowerStep | None:
        run = self.run
        assert run is not None
        assert run.call is not None
        tokens = TowerTokens(
            layer=layer,
            family=self.runtime.family,
            states=states,
            query=run.call.query,
            key=run.call.key,
            value=run.call.value,
            scaling=run.call.scaling,
            bias=run.bias,
            num_slots=run.num_slots,
            origin=run.origin,
            valid=run.valid,
            memory=run.memory,
        )
        step = self.method.reduce(tokens)
        if step is not None:
            run.put_away(states)
            run.follow(step)
        return step

    # -- the end ------------------------------------------------------------------------------------------------------

    def _restore(self, states: Tensor) -> Tensor:
        """All slots of the grid again; which of them are left is noted for the cut before the decoder."""
        run, self.run = self.run, None
        assert run is not None
        first = int(self.runtime.family.has_cls)
        self.runtime.readings.setdefault(self.probe.name, []).append(run.kept()[:, first:, None])
        if run.slots is None:
            return states
        run.put_away(states)
        return run.slots[:, :-1]

    def _refuse_video(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PromptError(
            f"{self.method.id} removes tokens inside the vision tower, but {self.runtime.family.name} pools the frames "
            "of a video behind it; use a method that reduces behind the tower, or images"
        )
