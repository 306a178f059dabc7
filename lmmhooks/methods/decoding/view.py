"""What a decoding method may look at: one step of the main branch, an image, the attention of a branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.layout import Layout
    from lmmhooks.vision import ImageTokens

__all__ = ["AttentionRow", "BranchAttention", "ImageView", "StepView"]


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
        Of the N positions, prompt and answer; rows of branches, if there are any, follow the main ones.
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
        Per entry of `DecodingMethod.reads_image`, ``[B, V]`` bool: False for what fills up. Layers behind a reduction
        have fewer visual tokens than those before it.
    memory
        Private to the method and emptied at every new prompt; what `DecodingMethod.edit_tokens` left there included.
    processor
        That was given to ``wrap``; None without one.
    cuts
        False where scores are wanted as they are before the plausibility cut; see `lmmhooks.methods.decoding.base.cut`.
    """

    family: Any
    states: Mapping[int, Tensor]
    rows: Mapping[int, AttentionRow]
    visual: Mapping[int, Tensor]
    is_visual: Mapping[int, Tensor]
    memory: dict[Any, Any]
    processor: Any = None
    cuts: bool = True

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
        family = self.family
        states = [self.states[layer] for layer in layers]
        if normed and (early := [i for i, layer in enumerate(layers) if layer < family.num_layers]):
            through = family.apply(family.norm, _stacked([states[i] for i in early]))
            for i, state in zip(early, through, strict=True):
                states[i] = state
        return family.token_logits(_stacked(states))


def _stacked(states: Sequence[Tensor]) -> Tensor:
    """States of layers that may lie on several devices, in one tensor on that of the last."""
    return torch.stack([state.to(states[-1].device) for state in states])


@dataclass(frozen=True, eq=False)
class ImageView:
    """
    One image (or video) of one row, for methods that show something else in a branch.

    Attributes
    ----------
    family
        The resolved model family.
    modality
        ``"image"`` or ``"video"``.
    tokens
        What each of its n visual tokens shows.
    readings
        By `Probe.name` of `DecodingMethod.probes`, float32 ``[n, C]``, ``[n]`` for scalars; NaN at tokens that show no
        place in the image.
    attention
        float32 ``[layers, n]``: what the last prompt token of the main branch paid to the image in the layers of
        `DecodingMethod.reads_prompt`, mean over heads; 0 at tokens that a reducer removed before. None for branches
        that do not read after the main one.
    prompt
        Long: the row's tokens without padding.
    ordinal
        Which image of its row it is, from 0.
    processor
        That was given to ``wrap``; None without one.
    reply
        Long ``[n]``: what the model said to the row's reading of `DecodingMethod.asks_first`; None without one.
    generator
        Makes a generator on the CPU that gives the image the same numbers in any batch.
    """

    family: Any
    modality: str
    tokens: ImageTokens
    readings: Mapping[str, Tensor]
    attention: Tensor | None
    prompt: Tensor
    ordinal: int
    processor: Any
    reply: Tensor | None
    generator: Callable[[], torch.Generator]


@dataclass(frozen=True, eq=False)
class BranchAttention:
    """
    One attention call of a decoder layer, cut down to the rows of one branch.

    Attributes
    ----------
    query, key, value
        ``[B, H, Nq, d]`` and ``[B, Hkv, N, d]``, after rotary embedding; the queries are the last of the N positions.
    layer
        0-based.
    layout
        Of the N positions.
    is_prefill
        Whether this forward reads the prompt.
    prompt_length
        How many of the N positions belong to the prompt; answers follow it.
    keep_for_later, from_earlier
        ``keep_for_later(name, values)`` notes something ``[B, Nq or 1, N]`` about positions, which
        ``from_earlier(name)`` hands out in later layers of the forward, in the coordinates of their sequence.
    weights_of
        ``weights_of(rows)``: float32 ``[B, H, R, N]`` after the softmax, of queries ``rows [B, R]``.
    plain
        ``plain()``: what the model's own function makes of it, ``[B, H, Nq, d]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layer: int
    layout: Layout
    is_prefill: bool
    prompt_length: int
    keep_for_later: Callable[[str, Tensor], None]
    from_earlier: Callable[[str], Tensor]
    weights_of: Callable[[Tensor], Tensor]
    plain: Callable[[], Tensor]
