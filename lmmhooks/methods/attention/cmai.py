"""
Cross-modality attention inhibition: text stops looking at image tokens that neither it nor related text looks at.

Redundant image tokens drown what a prompt says about the form of the answer. The focus of a text token t on an image
token v is its own attention plus that of earlier text, weighted by how much t attends to it:
``F[t, v] = A[t, v] + sum over t' < t of A[t, t'] A[t', v]``, with means over heads, for text after the image. In deeper
layers the image tokens with the lowest focus are hidden from t, all but one at most. Generated tokens have a focus of
their own.

There is no released code and only the abstract was at hand: the fraction, the layer, the mean over heads and a focus
that is not normalised are proposals, UNVERIFIED all of them, and fidelity to the paper cannot be checked. The paper's
other half, which compresses the image before the decoder, is no part of this method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import pad

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cmai", "focus", "least_focused"]


def focus(to_image: Tensor, to_text: Tensor, earlier: Tensor) -> Tensor:
    """
    How much rows look at image tokens, by themselves and through the text they attend to.

    Parameters
    ----------
    to_image
        ``[B, R, N]`` attention of the rows on image tokens.
    to_text
        ``[B, R, T]`` attention of the rows on earlier text.
    earlier
        ``[B, T, N]`` attention of that text on image tokens.

    Returns
    -------
    Tensor
        ``[B, R, N]`` float32.
    """
    return torch.baddbmm(to_image, to_text, earlier)


def least_focused(scores: Tensor, seen: Tensor, ratio: float) -> Tensor:
    """
    The image tokens with the lowest focus.

    Parameters
    ----------
    scores
        ``[B, R, N]`` focus.
    seen
        ``[B, R, N]`` bool: image tokens that a row can see.
    ratio
        Fraction of them, in [0, 1], rounded down to whole tokens; one is always left.

    Returns
    -------
    Tensor
        ``[B, R, N]`` bool. Of equal scores the first token goes.
    """
    order = scores.masked_fill(~seen, torch.inf).argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1)
    count = seen.sum(dim=-1, keepdim=True)
    # 0.29 of 100 tokens are 29, however the product rounds in float32.
    return rank < torch.minimum((ratio * count + 1e-3).long(), count - 1)


@dataclass(frozen=True)
class Cmai(AttentionMethod):
    """Cross-modality attention inhibition (see the module docstring)."""

    id: ClassVar[str] = "cmai"
    paper: ClassVar[str] = (
        "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy, 2411.15453"
    )
    rows: ClassVar[str] = "after_image"

    inhibit_ratio: float = setting(
        0.5,
        help="Fraction of the image tokens a text token can see that are hidden from it, in [0, 1], rounded down; one "
        "is always left. UNVERIFIED.",
    )
    focus_layer: int = setting(
        2, help="Layer in which focus is measured, 0-based; deeper layers are inhibited. UNVERIFIED."
    )
    per_layer: bool = setting(
        False,
        help="Measure focus in every layer from `focus_layer` on and inhibit that same layer, at the cost of a buffer "
        "of text x image weights per layer. UNVERIFIED.",
    )

    def __post_init__(self) -> None:
        self._require(0.0 <= self.inhibit_ratio <= 1.0, "inhibit_ratio", "in [0, 1]")
        self._require(self.focus_layer >= 0, "focus_layer", "at least 0")

    def check(self, family: Any) -> None:
        last = family.num_layers - (1 if self.per_layer else 2)
        self._require(self.focus_layer <= last, "focus_layer", f"at most {last}, so that a layer is left to inhibit")

    @property
    def is_identity(self) -> bool:
        return self.inhibit_ratio == 0

    def layers(self, family: Any) -> Sequence[int]:
        return range(self.focus_layer, family.num_layers)

    def edit_scores(self, scores: Tensor, context: AttentionContext) -> Tensor:
        # Text is never removed from a sequence, so that its tokens have the same numbers in every layer; 0 is no text.
        text = context.layout.valid & ~context.layout.visual
        numbers = text.cumsum(dim=1) * text
        is_row = context.layout.after_image.gather(1, context.positions)
        rows = numbers.gather(1, context.positions) * is_row
        if self.per_layer:
            inhibited = self.measure(scores, numbers, rows, context)
        elif context.layer == self.focus_layer:
            found = context.globalize(self.measure(scores, numbers, rows, context))
            _remember("inhibited", found, numbers, rows, context)
            return scores
        else:
            found = context.memory["inhibited"]
            inhibited = context.localize(found.gather(1, rows[..., None].expand(-1, -1, found.shape[-1])))
            # A cut in between may have removed all image tokens that a row was left with.
            inhibited = inhibited & (_seen(context) & ~inhibited).any(dim=-1, keepdim=True)
        inhibited = pad(inhibited, (0, scores.shape[-1] - inhibited.shape[-1])) & is_row[..., None]
        return scores.masked_fill_(inhibited[:, None], torch.finfo(torch.float32).min)

    def measure(self, scores: Tensor, numbers: Tensor, rows: Tensor, context: AttentionContext) -> Tensor:
        """
        What is hidden from some rows, ``[B, R, P]`` bool over the P keys of the prompt.

        Parameters
        ----------
        scores
            ``[B, H, R, N]``.
        numbers
            ``[B, N]`` long: text tokens counted from 1, 0 for everything else.
        rows
            ``[B, R]`` long: the numbers of the rows, 0 for rows that are no text after an image.
        """
        weights = torch.softmax(scores, dim=-1).mean(dim=1)
        earlier = context.memory.get(context.layer)
        width = context.layout.length if earlier is None else earlier.shape[-1]
        seen = _seen(context)[..., :width]
        to_image = weights[..., :width] * seen
        earlier = _remember(context.layer, to_image, numbers, rows, context)
        # Where the text tokens stand: number to key. A row takes nothing from itself, nor from what is no text.
        places = torch.zeros_like(earlier[..., 0], dtype=torch.long)
        places = places.scatter(1, numbers, torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers))
        counted = torch.arange(places.shape[1], device=places.device)
        before = (counted > 0) & (counted < rows[..., None])
        to_text = weights.gather(2, places[:, None].expand(-1, weights.shape[1], -1)) * before
        return least_focused(focus(to_image, to_text, earlier), seen, self.inhibit_ratio)

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        buffers = {key: value for key, value in memory.items() if isinstance(value, torch.Tensor)}
        memory.update({key: value.index_select(0, rows.to(value.device)) for key, value in buffers.items()})


def _seen(context: AttentionContext) -> Tensor:
    """``[B, R, N]`` bool: image tokens before each row."""
    keys = torch.arange(context.layout.length, device=context.rows.device)
    return context.layout.visual[:, None] & (keys < context.positions[..., None])


def _remember(key: Any, values: Tensor, numbers: Tensor, rows: Tensor, context: AttentionContext) -> Tensor:
    """Write ``[B, R, P]`` into a buffer ``[B, T + 1, P]`` at the numbers of the rows; entry 0 takes what is no row."""
    memory, length = context.memory, context.layout.length
    if "prompt_text" not in memory:
        memory["prompt_text"] = int(numbers.max())
    # Columns beyond the prompt are text of every row.
    answer = length - (context.prompt_length if context.index is None else context.index.shape[1])
    kept = memory.get(key, values[:, :0])
    kept = pad(kept, (0, 0, 0, memory["prompt_text"] + 1 + answer - kept.shape[1]))
    kept = kept.scatter(1, rows[..., None].expand_as(values), values)
    memory[key] = kept
    return kept
