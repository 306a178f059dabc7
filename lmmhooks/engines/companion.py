"""A second reading of the prompt, without its images, that advances through the decoder beside the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.rows import take_rows

if TYPE_CHECKING:
    from lmmhooks.engines.passes import PlainPasses
    from lmmhooks.engines.runtime import Runtime

__all__ = ["Companion"]


class Companion:
    """
    Runs the layers of the decoder on a prompt without images, one stop at a time.

    A plain pass runs up to the first stop and records what layers are called with besides their hidden states (rotary
    angles, mask): the same for all layers of one type. From the first stop on the layers are run one by one with the
    gains decided there.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    passes
        Of the prompt.
    stops
        Decoder layers at which heads are compared, ascending.
    """

    def __init__(self, runtime: Runtime, passes: PlainPasses, stops: Sequence[int]) -> None:
        self.runtime = runtime
        self.passes = passes
        self.next = stops[0]
        family = runtime.family
        self._types: Sequence[Any] = getattr(family.text_config, "layer_types", None) or [None] * family.num_layers
        self._arguments: dict[Any, dict[str, Any]] = {}
        self._hidden: Tensor | None = None
        # Layers of another type than the first stop's may be called with another mask: the pass goes on to see it.
        first = {self._types[layer]: layer for layer in reversed(range(stops[0], stops[-1] + 1))}

        def show(layer: int, hidden: Tensor, arguments: dict[str, Any]) -> None:
            self._arguments[self._types[layer]] = arguments
            if layer == stops[0]:
                self._hidden = hidden

        passes.run(False, inputs={layer: partial(show, layer) for layer in first.values()}, through=max(first.values()))

    def advance(self, layer: int, decide: Callable[[Tensor], Tensor]) -> None:
        """
        Run the layers up to and including ``layer``, whose heads are compared.

        Parameters
        ----------
        layer
            A stop, later than the one before.
        decide
            Attention output of the companion at its last position, ``[B, H, d]``, to the gain ``[B, H]`` that its heads
            get at all positions.
        """
        last = self.passes.last_positions(image=False)

        def compare(call: AttentionCall) -> AttentionResult:
            output, weights = call.run_base()
            gain = decide(take_rows(output.transpose(1, 2), last.to(output.device))[:, :, 0])
            return output * gain[:, None, :, None].to(output.device, output.dtype), weights

        with self.runtime.silent({layer: compare}), torch.no_grad():
            # In a context of its own: transformers collects attention weights for the caller in a context variable.
            Context().run(self._run_layers, range(self.next, layer + 1))
        self.next = layer + 1

    def _run_layers(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            # Not through __call__: hooks on the layer belong to the reading of the whole prompt.
            layer = self.runtime.family.layers[number]
            self._hidden = layer.forward(self._hidden, **self._arguments[self._types[number]])
