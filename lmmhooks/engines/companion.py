"""A second reading of the prompt, without its images, that advances through the decoder beside the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    A short plain pass records what every layer is called with besides its hidden states (rotary angles, mask), none of
    which depends on them; from the first stop on the layers are run one by one with the gains decided there.

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
        self._arguments: dict[int, dict[str, Any]] = {}
        self._hidden: Tensor | None = None

        def keep(layer: int) -> Callable[[Tensor, dict[str, Any]], None]:
            def show(hidden: Tensor, arguments: dict[str, Any]) -> None:
                self._arguments[layer] = arguments
                if layer == stops[0]:
                    self._hidden = hidden

            return show

        layers = range(stops[0], stops[-1] + 1)
        passes.run(False, inputs={layer: keep(layer) for layer in layers}, through=stops[-1])

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

        with self.passes.silent({layer: compare}), torch.no_grad():
            for number in range(self.next, layer + 1):
                # Not through __call__: hooks on the layer belong to the reading of the whole prompt.
                self._hidden = self.runtime.family.layers[number].forward(self._hidden, **self._arguments[number])
        self.next = layer + 1
