"""Whole attention matrices of a prompt and its answer, in places of the prompt as given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.errors import PromptError

if TYPE_CHECKING:
    from lmmhooks.engines.editing import Edit
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["Matrices", "positions_of"]


class Matrices:
    """
    Collects whole attention matrices, reduced over heads block by block.

    Parameters
    ----------
    runtime
        Of the wrapped model.
    layers
        Decoder layers, 0-based.
    reduce
        ``reduce(layer, weights [H, R, N])`` to ``[R, N]``, or None where only looked at.

    Attributes
    ----------
    probes
        For `lmmhooks.engines.runtime.Runtime.probing`.
    """

    def __init__(self, runtime: Runtime, layers: Sequence[int], reduce: Callable[[int, Tensor], Tensor | None]) -> None:
        self.runtime = runtime
        self.reduce = reduce
        self.probes = [DecoderProbe(layer, "all", hears=self._listener(layer), on_decode=True) for layer in layers]
        self._blocks: dict[int, tuple[PromptState, dict[int, list[tuple[Tensor, Tensor, Tensor]]]]] = {}

    def dense(self, length: int) -> dict[int, Tensor]:
        """
        The newest prompt's matrices by layer: float32 ``[length, length]`` on the CPU, 0 where nothing was read.

        Rows and columns are positions of the prompt as given, then of the tokens after it.
        """
        _, layers = self._blocks.get(id(self.runtime.last_state), (None, {}))
        out = {}
        for layer, blocks in layers.items():
            full = torch.zeros(length, length)
            for weights, rows, columns in blocks:
                full[rows[:, None], columns] = weights
            out[layer] = full
        return out

    def _listener(self, layer: int) -> Callable[[Tensor, Tensor, Tensor, Edit], None]:
        def hear(weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
            own = members[0].nonzero().flatten()
            reduced = self.reduce(layer, weights[0][:, own]) if len(own) else None
            if reduced is None:
                return
            positions = positions_of(edit)
            first = len(positions) - edit.call.query.shape[2]
            at = positions[rows[0, own].cpu() + first]
            known = (positions >= 0).nonzero().flatten()
            _, layers = self._blocks.setdefault(id(edit.state), (edit.state, {}))
            layers.setdefault(layer, []).append((reduced.cpu()[:, known], at, positions[known]))

        return hear


def positions_of(edit: Edit) -> Tensor:
    """Long ``[N]``, CPU: place of every key in the prompt as given, tokens after it counted on; -1: padding."""
    layout, prompt = edit.stage.layout, edit.state.layout.length
    if not edit.state.is_prefill and edit.layer in edit.state.pressed:
        raise PromptError(
            f"the cache of decoder layer {edit.layer} was compressed and holds other positions for every head, so rows "
            "of answers cannot be placed; read the last prompt row alone with max_new_tokens=1 and kind='raw'"
        )
    if edit.stage.index is None:
        return torch.arange(layout.length).masked_fill(~layout.valid[0].cpu(), -1)
    held = edit.stage.index[0].cpu()
    return torch.cat([held, prompt + torch.arange(layout.length - len(held))])
