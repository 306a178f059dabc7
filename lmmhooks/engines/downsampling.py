"""Runs the vision tower on smaller images; everything behind it sees the grid of the images as given."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from lmmhooks.engines.attach import Attachments

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.methods.reduction.downsample import Downsample

__all__ = ["DownsamplingEngine"]


class DownsamplingEngine:
    """
    Hooks the tower: fewer pixels in, features spread over the full grid out.

    Projector, packing of tiles and placeholder counts then work as ever, and the ordinary cut before the decoder
    removes every token but one for each cell of the small image.
    """

    def __init__(self, runtime: Runtime, method: Downsample) -> None:
        self.runtime = runtime
        self.method = method
        self.parameters = list(inspect.signature(runtime.family.vision.forward).parameters)
        self._calls: list[tuple[Any, Any]] = []

    def attach(self, attachments: Attachments) -> None:
        """Hook the tower."""
        tower = self.runtime.family.vision
        attachments.pre_hook(tower, self._enter, "vision tower (smaller images)")
        attachments.hook(tower, self._leave, "vision tower (smaller images)", always=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        family = self.runtime.family
        arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        full = family.token_grids(arguments)
        small = [self.method.grid(rows, cols) for _, rows, cols in full]
        self._calls.append((full, small))
        return (), family.shrink(arguments, small)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._calls:
            return None
        full, small = self._calls.pop()
        return None if output is None else self.runtime.family.enlarge(output, full, small)
