"""What a method may look at before the decoder reads a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lmmhooks.layout import Layout
    from lmmhooks.methods.probe import Probe

__all__ = ["Passes", "PromptContext"]


class Passes(Protocol):
    """
    Forwards of the unpatched decoder over the prompt, run when they are asked for and at most once each.

    ``image=False`` leaves out visual tokens and the tokens that open and close an image; positions are counted anew.
    """

    def last_hidden(self, image: bool) -> Tensor:
        """Output of every decoder layer at the last position of each row, ``[L, B, D]`` in the model's dtype."""
        ...

    def first_logits(self, image: bool = True) -> Tensor:
        """Logits of the first token of the answer, ``[B, vocabulary]`` float32."""
        ...

    def head_outputs(self, layers: Sequence[int], image: bool) -> dict[int, Tensor]:
        """Attention output per head at the last position, before the output projection: per layer ``[B, H, d]``."""
        ...


@dataclass
class PromptContext:
    """
    One batch of prompts, just before the decoder reads it.

    Attributes
    ----------
    family
        The resolved model family.
    layout
        Layout of the prompt as given, before any reduction: masks ``[B, N]``.
    input_ids
        ``[B, N]``.
    embeddings
        ``[B, N, D]`` input of the decoder: word embeddings with visual features in their places. Not to be changed.
    passes
        Forwards of the unpatched decoder over this prompt.
    tokenizer
        Of the processor that was given to ``wrap``; None without one.
    memory
        Dictionary private to the method and emptied at every new prompt; the one its later contexts carry.
    read
        Values of a vision probe that the method declared, ``[B, N]``; NaN at positions the tower knows nothing of.
    """

    family: Any
    layout: Layout
    input_ids: Tensor
    embeddings: Tensor
    passes: Passes
    tokenizer: Any
    memory: dict[Any, Any]
    read: Callable[[Probe], Tensor]
