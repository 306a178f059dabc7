"""
Contract of attention methods.

Shapes: B rows of the batch, H query heads, R edited query rows, N keys, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.layout import Layout

__all__ = ["AttentionContext", "AttentionMethod"]

STEPS = ("scale_keys", "edit_scores", "edit_weights", "scale_heads")


@dataclass
class AttentionContext:
    """
    What an attention method may look at during one attention call.

    Attributes
    ----------
    layer
        Index of the decoder layer, 0-based.
    family
        The resolved model family.
    layout
        Layout of the keys of this call: its masks are ``[B, N]`` and already cover cached and generated positions.
    rows
        ``[B, R]`` indices of the edited query rows among the queries of this call.
    is_prefill
        True for the forward that reads the prompt.
    memory
        Dictionary private to the method and emptied at every new prompt.
    """

    layer: int
    family: Any
    layout: Layout
    rows: Tensor
    is_prefill: bool
    memory: dict[Any, Any]


@dataclass(frozen=True)
class AttentionMethod(Method):
    """
    Edits attention in decoder layers.

    The engine runs the model's own attention backend for all rows and recomputes the edited rows exactly. Per layer and
    call it applies, in this order: ``scale_keys``, ``edit_scores``, softmax in float32, ``edit_weights``, the product
    with the values, ``scale_heads``. Override only what the method does. With several methods on a layer each step runs
    for all of them in the order in which they were given to ``wrap``.
    """

    kind: ClassVar[str] = "attention"
    rows: ClassVar[str] = "after_image"
    """Edited rows of the prompt: ``"after_image"`` (text with a visual token before it), ``"last"`` or ``"all"``."""
    on_decode: ClassVar[bool] = True
    """Whether rows of generated tokens are edited too."""
    observes: ClassVar[bool] = False
    """Whether :meth:`observe` wants the input of each of its layers at prefill."""

    edits: ClassVar[frozenset[str]] = frozenset()
    """Steps the class defines itself, found when it is created; the engine skips those that no method defines."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.edits = frozenset(step for step in STEPS if getattr(cls, step) is not getattr(AttentionMethod, step))

    def layers(self, family: Any) -> Sequence[int]:
        """Decoder layers that are edited, 0-based."""
        return range(family.num_layers)

    def observe(self, hidden: Tensor, context: AttentionContext) -> None:
        """
        Look at the input of a layer during prefill, before its norm.

        Parameters
        ----------
        hidden
            ``[B, N, D]`` in the model's dtype; must not be changed.
        context
            ``context.rows`` is empty here.
        """

    def scale_keys(self, context: AttentionContext) -> Tensor | None:
        """Factors on keys for the edited rows, ``[B, N]`` or ``[B, H, N]`` float32, or None for no change."""
        return None

    def edit_scores(self, scores: Tensor, context: AttentionContext) -> Tensor:
        """
        Change scaled logits ``q k^T / sqrt(d)`` before the softmax.

        Parameters
        ----------
        scores
            ``[B, H, R, N]`` float32; keys a row may not see hold the smallest float32.

        Returns
        -------
        Tensor
            Same shape. May be the input, changed in place.
        """
        return scores

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        """
        Change attention weights after the softmax.

        Parameters
        ----------
        weights
            ``[B, H, R, N]`` float32; rows sum to 1, invisible keys are exactly 0.

        Returns
        -------
        Tensor
            Same shape. May be the input, changed in place.
        """
        return weights

    def scale_heads(self, queries: Tensor, outputs: Tensor, context: AttentionContext) -> Tensor | None:
        """
        Gain per head on the attention output, before the output projection.

        Parameters
        ----------
        queries
            ``[B, H, R, d]`` queries of the edited rows, after rotary embedding.
        outputs
            ``[B, H, R, d]`` attention output of the edited rows.

        Returns
        -------
        Tensor or None
            Gain broadcastable to ``[B, H, R, 1]``, or None for no change.
        """
        return None
