"""Derivatives with respect to attention weights, through the explicit rows of the attention engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lmmhooks.errors import PromptError
from lmmhooks.inspect.maps.reading import Passes
from lmmhooks.inspect.maps.replay import Replay, frozen
from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.patch import wrap

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["Watch", "WatchedWeights", "through_rows"]


@dataclass(frozen=True, eq=False)
class WatchedWeights:
    """
    Attention weights of some rows of a layer, part of a graph.

    Attributes
    ----------
    graph
        ``[1, H, R, N]`` float32, after the edits of all methods.
    rows, columns
        Long ``[R]`` and ``[N]``, CPU: places in the prompt as given, tokens after it counted on; -1 for padding.
    """

    graph: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def weights(self) -> Tensor:
        """``[H, R, N]`` by themselves."""
        return self.graph[0].detach()


@dataclass(frozen=True)
class Watch(AttentionMethod):
    """
    Changes nothing and holds on to attention weights, from which on gradients are recorded.

    Not registered: only maps attach it, after all methods of the model, so that it sees weights after their edits.
    """

    watched_layers: tuple[int, ...] = ()
    whole: bool = False
    """All rows of the prompt, not only tokens that continue it."""

    id: ClassVar[str] = "watched-weights"
    paper: ClassVar[str] = "none; reads derivatives"

    @property
    def rows(self) -> str:  # type: ignore[override] # fixed for a class elsewhere, here by a field
        return "all" if self.whole else "last"

    def layers(self, family: object) -> Sequence[int]:
        return self.watched_layers

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        if not torch.is_grad_enabled():
            return weights
        if not weights.requires_grad:
            # The lowest watched layer: nothing in front of it needs a gradient.
            weights = weights.detach().requires_grad_()
        blocks = context.memory.setdefault(context.layer, [])
        blocks.append(WatchedWeights(weights, *_places(context)))
        return weights


def _places(context: AttentionContext) -> tuple[Tensor, Tensor]:
    length = context.layout.length
    if context.index is None:
        columns = torch.arange(length).masked_fill(~context.layout.valid[0].cpu(), -1)
    else:
        held = context.index[0].cpu()
        columns = torch.cat([held, context.prompt_length + torch.arange(length - len(held))])
    return columns[context.positions[0].cpu()], columns


@contextmanager
def through_rows(passes: Passes, layers: Sequence[int], *, whole: bool) -> Iterator[_Derivatives]:
    """
    Read the prompt in a way that lets derivatives with respect to attention be taken.

    Parameters
    ----------
    passes
        Of the wrapped model.
    layers
        Whose weights are asked about.
    whole
        Of all rows of the prompt, whose graph is as large as the prompt; otherwise of the newest row, whose graph is
        that of one token.

    Raises
    ------
    PromptError
        A decoding method is on the model: its logits come from several readings.
    """
    runtime = passes.runtime
    for method in runtime.methods():
        if isinstance(method, DecodingMethod):
            raise PromptError(
                f"maps that need derivatives follow one reading of the prompt, and {method.id} combines several; use "
                "kind='raw', or take the map inside patch.disabled()"
            )
    watch = Watch(watched_layers=tuple(sorted(layers)), whole=whole)
    with frozen(passes.model), wrap(passes.model, watch, processor=passes.processor) as patch:
        yield _Derivatives(passes, runtime, patch.methods[-1])


class _Derivatives:
    """A replay whose logits can be differentiated by the weights of the newest rows."""

    def __init__(self, passes: Passes, runtime: Runtime, watch: object) -> None:
        self.replay: Replay = passes.replay()
        self.runtime = runtime
        self.watch = watch

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards in here are recorded; their graph goes at the end."""
        with torch.enable_grad():
            yield
        self._memory().clear()
        self.replay.detach()

    def by_weights(self, value: Tensor) -> dict[int, list[tuple[WatchedWeights, Tensor]]]:
        """Derivative ``[H, R, N]`` of a number by all weights watched since recording began, per layer and block."""
        blocks = [(layer, block) for layer, found in self._memory().items() for block in found]
        gradients = torch.autograd.grad(value, [block.graph for _, block in blocks], allow_unused=True)
        out: dict[int, list[tuple[WatchedWeights, Tensor]]] = {}
        for (layer, block), gradient in zip(blocks, gradients, strict=True):
            # Rows of the last layer other than the last one reach nothing that is read.
            known = torch.zeros_like(block.weights) if gradient is None else gradient[0]
            out.setdefault(layer, []).append((block, known))
        return out

    def _memory(self) -> dict[int, list[WatchedWeights]]:
        return self.runtime.last_state.memory(self.watch)
