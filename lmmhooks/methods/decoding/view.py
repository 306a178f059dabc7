"""What a decoding method may look at, at one step, besides the logits of its branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.layout import Layout

__all__ = ["AttentionRow", "StepView"]


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """
    What the newest token attends to in one decoder layer.

    Attributes
    ----------
    weights
        ``[B, H, N]`` float32 after the softmax; padding has weight 0.
    value
        ``[B, Hkv, N, d]``.
    layout
        Of the N positions, prompt and answer.
    """

    weights: Tensor
    value: Tensor
    layout: Layout


@dataclass(frozen=True, eq=False)
class StepView:
    """
    One step of the main branch, seen from inside the decoder.

    Attributes
    ----------
    family
        The resolved model family.
    states
        Per entry of `DecodingMethod.reads`, ``[B, D]`` at the newest token: the input of that decoder layer (0: the
        embedding); for ``family.num_layers``, the output of the final norm.
    rows
        Per layer of `DecodingMethod.reads_attention`, what the newest token attends to there.
    visual
        Per entry of `DecodingMethod.reads_image`, ``[B, V, D]`` at the visual tokens of the prompt, rows with fewer
        filled up.
    is_visual
        ``[B, V]`` bool: False for what fills up; None without `reads_image`.
    memory
        Private to the method and emptied at every new prompt.
    """

    family: Any
    states: Mapping[int, Tensor]
    rows: Mapping[int, AttentionRow]
    visual: Mapping[int, Tensor]
    is_visual: Tensor | None
    memory: dict[Any, Any]

    def early_logits(self, layers: Sequence[int], normed: bool) -> Tensor:
        """
        Logits that the head makes of states of earlier layers.

        Parameters
        ----------
        layers
            Among `DecodingMethod.reads`.
        normed
            Whether states of layers before the last go through the final norm first.

        Returns
        -------
        Tensor
            float32 ``[len(layers), B, vocabulary]``.
        """
        depth = self.family.num_layers
        stacked = torch.stack(
            [
                self.family.norm(self.states[layer]) if normed and layer < depth else self.states[layer]
                for layer in layers
            ]
        )
        return self.family.token_logits(stacked)
