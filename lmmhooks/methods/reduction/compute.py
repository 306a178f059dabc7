"""
Contract of methods that keep every visual token and compute less with it.

Shapes: n tokens of one prompt without its padding, H query heads, Hkv key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.cost import LayerCounts
from lmmhooks.methods.base import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ComputeContext", "ComputeMethod", "PromptTokens", "layers_inside"]


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """
    What the tokens of one prompt are, padding left out, as a decoder layer sees them.

    Attributes
    ----------
    image
        ``[n]`` long: ordinal of the image or video a token belongs to, in sequence order; -1 for text.
    crop, row, col
        ``[n]`` long: cell of a visual token in the grid of its crop (tile, frame); -1 for text, for tokens that show
        no place (newlines), and where the geometry is unknown.
    placed
        Whether the geometry of all images is known.
    """

    image: Tensor
    crop: Tensor
    row: Tensor
    col: Tensor
    placed: bool

    def __len__(self) -> int:
        return self.image.numel()

    @cached_property
    def visual(self) -> Tensor:
        """``[n]`` bool."""
        return self.image >= 0

    @cached_property
    def num_visual(self) -> int:
        """Visual tokens; waits for the device where the tensors are not on the CPU."""
        return int(self.visual.sum())

    def to(self, device: torch.device) -> PromptTokens:
        """The same with tensors on another device."""
        image, crop, row, col = (values.to(device) for values in (self.image, self.crop, self.row, self.col))
        return PromptTokens(image, crop, row, col, self.placed)


@dataclass(frozen=True, eq=False)
class ComputeContext:
    """
    What a method may look at while one prompt passes the attention of one decoder layer.

    Attributes
    ----------
    layer
        0-based.
    family
        The resolved model family.
    sample
        Row of the batch.
    tokens
        The prompt's tokens, on the device of the attention call.
    scaling
        Factor on the dot products.
    memory
        Private to the method, emptied at every new prompt, shared by rows and layers.
    plan
        Private to the method and shared by layers that see the same sequence of the same row: index arithmetic is done
        once per prompt. Emptied when the prompt has been read.
    """

    layer: int
    family: Any
    sample: int
    tokens: PromptTokens
    scaling: float
    memory: dict[Any, Any]
    plan: dict[Any, Any]


@dataclass(frozen=True)
class ComputeMethod(Method):
    """
    Leaves out computation of the prompt in decoder layers; all tokens and the whole cache stay.

    A layer may freeze visual rows (:meth:`frozen_layers`) or answer its attention itself (:meth:`attend`). Both hold
    while a prompt with an image is read; decode steps are the model's own.
    """

    kind: ClassVar[str] = "reduction"

    def frozen_layers(self, family: Any) -> Sequence[int]:
        """
        Decoder layers that visual tokens pass unchanged, 0-based.

        They have no query, no attention output and no feed-forward part there, but their keys and values are computed
        from the states they stand still in, for text to look at.
        """
        return ()

    def sparse_layers(self, family: Any) -> Sequence[int]:
        """Decoder layers whose attention :meth:`attend` computes, 0-based; none that is frozen."""
        return ()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: ComputeContext) -> Tensor | None:
        """
        Attention of one prompt in a layer of `sparse_layers`.

        Parameters
        ----------
        query
            ``[H, n, d]`` after rotary embedding, without padding.
        key, value
            ``[Hkv, n, d]``, ``H`` a multiple of ``Hkv``.
        context
            What is known about the prompt; it has an image.

        Returns
        -------
        Tensor or None
            ``[H, n, d]``; None where nothing is to be left out, so that the model's own attention answers.
        """
        raise NotImplementedError

    def layer_counts(
        self, family: Any, layer: int, sample: int, tokens: PromptTokens, memory: dict[Any, Any]
    ) -> LayerCounts:
        """
        What one of its layers did with a prompt, for the cost model; pairs by the "square" convention.

        Parameters
        ----------
        sample, tokens, memory
            As in `ComputeContext`; ``tokens`` on the CPU.
        """
        raise NotImplementedError


def layers_inside(method: Method, name: str, family: Any) -> None:
    """Refuse a setting that lists decoder layers this model does not have; None lists none."""
    last = family.num_layers - 1
    inside = all(0 <= layer <= last for layer in getattr(method, name) or ())
    method._require(inside, name, f"layers of this model, 0 to {last}")
