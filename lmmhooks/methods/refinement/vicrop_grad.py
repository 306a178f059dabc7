"""
ViCrop by gradient-weighted attention: what the last position looks at, as far as the first answer token hangs on it.

Attention over the image in one layer times the positive part of the derivative of the most likely first token's
log-probability, mean over heads; the best window on the map is cut out of the image and shown beside it. The derivative
is exact and costs one token: the last row of a layer acts on the last position alone, so the prompt is read as ever and
its last token once more with a graph from that layer on. The released code keeps the graph of the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.refinement.base import Look
from lmmhooks.methods.refinement.vicrop import LayerViCrop

__all__ = ["ViCropGradient", "weighted"]


def weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """Attention ``[H, n]`` times the positive part of a derivative by it, head mean: ``[n]`` float64."""
    return (attention.double() * gradient.double().relu()).mean(dim=0)


@dataclass(frozen=True)
class ViCropGradient(LayerViCrop):
    """Cut out what the first answer token hangs on."""

    id: ClassVar[str] = "vicrop-grad"

    def gradient_layers(self, family: Any) -> tuple[int, ...]:
        return (self._layer(family),)

    def importance(self, look: Look) -> Tensor:
        return weighted(*look.gradient(look.prompt, self._layer(look.family)))
