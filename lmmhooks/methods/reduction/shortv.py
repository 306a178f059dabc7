"""
ShortV: in most layers visual tokens need not change; there they only serve as keys and values for the text.

In a replaced layer the text rows are computed as ever. Visual rows have no query, no attention output and no
feed-forward part, so their states leave the layer as they came; keys and values are still made of them.

Which layers: those where freezing the visual tokens changes the next-token distribution least ("layer contribution").
The divergence is that of the released code, ``KL(frozen || full)``. Differs from it in that any batch, padding and
number of images go through, where the release knows one prompt of LLaVA with its image at position 35.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lmmhooks.cost import LayerCounts
from lmmhooks.methods.base import names_record, setting
from lmmhooks.methods.reduction.compute import ComputeMethod, PromptTokens, layers_inside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ShortV", "layer_contribution"]

#: Replaced layers by model, in order of increasing layer contribution. Source: released lists; N is their length.
PUBLISHED: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("llava", 4096, 32): (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    ("llava", 5120, 40): (
        *(39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31),
        *(2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
    ),
    ("llava_next", 4096, 32): (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2),
    ("llava_next", 5120, 40): (
        *(39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2),
        *(28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ),
}

SHARE = 0.6
"""Share of the layers that the paper replaces: 19 of 32, 24 of 40."""


def layer_contribution(full: Tensor, frozen: Tensor) -> Tensor:
    """
    How much a layer does for visual tokens.

    Parameters
    ----------
    full, frozen
        ``[B, vocabulary]`` next-token logits of the whole model, and with visual tokens frozen in that layer.

    Returns
    -------
    Tensor
        ``[B]`` float32, ``KL(frozen || full)`` in nats.
    """
    log_full, log_frozen = full.float().log_softmax(dim=-1), frozen.float().log_softmax(dim=-1)
    return (log_frozen.exp() * (log_frozen - log_full)).sum(dim=-1)


@dataclass(frozen=True)
class ShortV(ComputeMethod):
    """
    Freeze visual tokens in the layers that do least for them.

    Published settings: 19 layers on LLaVA-1.5-7B and LLaVA-NeXT-7B, 24 on the 13B models.
    """

    id: ClassVar[str] = "shortv"
    paper: ClassVar[str] = (
        "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers, ICCV "
        "2025, arXiv 2504.00502"
    )
    code: ClassVar[str] = "https://github.com/icip-cas/ShortV"
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {"layers": "command"}

    layers: Any = setting(
        None,
        help="Decoder layers to freeze, in order of increasing layer contribution, 0-based. None: the published list "
        "of this model, or the order that `lmmhooks calibrate shortv` found; a path ending in .json: such an order.",
    )
    num_layers: int | None = setting(
        None,
        help="How many of them, from the front. None: all that are given or published; of an order that was measured, "
        "0.6 of the decoder's layers (paper: 19 of 32, 24 of 40).",
    )

    def __post_init__(self) -> None:
        if self.layers is not None and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        given = self.layers
        listed = isinstance(given, tuple) and all(type(layer) is int and layer >= 0 for layer in given)
        once = not listed or len(set(given)) == len(given)
        allowed = "layer numbers >= 0, each once, a path that ends in .json, or None"
        self._require(given is None or names_record(given) or (listed and once), "layers", allowed)
        self._require(self.num_layers is None or self.num_layers >= 0, "num_layers", ">= 0 or None")
        if listed and self.num_layers is not None:
            self._require(self.num_layers <= len(given), "num_layers", f"at most {len(given)}, the layers listed")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        layers = PUBLISHED.get((family.name, family.hidden_size, family.num_layers))
        return {} if layers is None else {"layers": layers}

    def check(self, family: Any) -> None:
        if isinstance(self.layers, tuple):
            layers_inside(self, "layers", family)
        self._require((self.num_layers or 0) <= family.num_layers, "num_layers", f"at most {family.num_layers}")

    def bind(self, family: Any) -> ShortV:
        if isinstance(self.layers, tuple) or self.num_layers is not None:
            return self
        return replace(self, num_layers=round(SHARE * family.num_layers))

    @property
    def is_identity(self) -> bool:
        return self.layers == () or self.num_layers == 0

    def frozen_layers(self, family: Any) -> Sequence[int]:
        layers: tuple[int, ...] = self.layers[: self.num_layers]
        return layers

    def layer_counts(
        self, family: Any, layer: int, sample: int, tokens: PromptTokens, memory: dict[Any, Any]
    ) -> LayerCounts:
        return LayerCounts.frozen_visual(len(tokens) - tokens.num_visual, tokens.num_visual)
