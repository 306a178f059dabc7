"""
OPERA: hallucination begins where later tokens keep attending to one earlier "summary" token instead of the image.

Such a token is a column of the answer's attention map whose entries stay large: the product down the column. Candidates
of beam search that strengthen it are penalised; where it has been the strongest for many steps, decoding goes back to
just behind it and chooses another token.

Differs from the released code: it votes per sample, where the release takes one prompt at a time; running products
replace the product over the whole map at every step; and a rejected token is forgotten when an earlier one is chosen
anew right before it only, as intended there, without the list entries the release empties by counting from the wrong
end. Rows without an image are searched by plain beam search. With ``penalty_weights=0`` and ``threshold=None`` nothing
is left to do and nothing is attached, the restriction to candidates included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import pad

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.search import Judgement, SearchMethod

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Opera", "column_products", "mode", "over_trust"]

UNIT = 1e-7
"""Factor on column products, so that float16 holds the interesting ones (authors' code)."""
FIRST_TOKENS = 10
"""Answers up to this length are judged by image attention (authors' code; not tied to the next constant)."""
EARLIEST = 10
"""Summary tokens before this position send nobody back (authors' code)."""


def column_products(trail: Tensor, attention: Tensor, scale: float) -> Tensor:
    """
    Logarithm of the product down every column of the scaled attention map, one row further.

    Parameters
    ----------
    trail
        ``[..., n - 1]`` logarithms so far.
    attention
        ``[..., K, n]``: the new row of each candidate; its last entry opens a column.
    scale
        Factor on attention.

    Returns
    -------
    Tensor
        ``[..., K, n]``. In the logarithm a product of hundreds of factors neither overflows nor vanishes on the way.
    """
    return pad(trail, (0, 1))[..., None, :] + (scale * attention.to(trail.dtype)).log()


def over_trust(products: Tensor) -> tuple[Tensor, Tensor]:
    """
    The largest column product and its column, the earlier one among equals.

    Products are compared as float16 numbers, as in the release: below 3e-8 they vanish, above 65504 they are infinite.

    Parameters
    ----------
    products
        ``[..., n]`` logarithms.

    Returns
    -------
    tuple of Tensor
        Score, float32 ``[...]``, and position, long ``[...]``.
    """
    scores = (UNIT * products.exp()).half().float()
    best = scores.amax(dim=-1)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    return best, torch.where(scores == best[..., None], columns, scores.shape[-1]).amin(dim=-1)


def mode(values: Tensor) -> Tensor:
    """The most frequent of the last dimension of ``[..., k]`` whole numbers, the smallest among equals, ``[...]``."""
    counts = (values[..., None] == values[..., None, :]).sum(dim=-1)
    frequent = counts == counts.amax(dim=-1, keepdim=True)
    return values.masked_fill(~frequent, torch.iinfo(values.dtype).max).amin(dim=-1)


@dataclass(frozen=True)
class Opera(SearchMethod):
    """Penalise candidates of beam search by over-trust, and choose anew behind a token that keeps drawing it."""

    id: ClassVar[str] = "opera"
    paper: ClassVar[str] = "OPERA: Over-Trust Penalty and Retrospection-Allocation, CVPR 2024, arXiv:2311.17911"
    code: ClassVar[str] = "https://github.com/shikiw/OPERA"
    conflicts: ClassVar[Mapping[str, str]] = {
        "memvr": "memvr decides once per forward, at its last token, where opera reads several next tokens in one"
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"num_attn_candidates": 1, "threshold": 25},  # the authors' advice where time is short
    }

    scale_factor: float = setting(50.0, help="Factor on attention weights before they are multiplied, above 0.")
    threshold: int | None = setting(
        15, help="Steps that must point at one token before decoding goes back to it, 0 or more; None: it never does."
    )
    num_attn_candidates: int = setting(5, help="Most likely next tokens looked at per beam, 1 or more.")
    penalty_weights: float = setting(1.0, help="Factor on what is subtracted from candidates' logits, 0 or more.")
    window_size: int = setting(512, help="Answer tokens within which decoding can go back, 1 or more.")

    def __post_init__(self) -> None:
        self._require(self.scale_factor > 0, "scale_factor", "above 0")
        self._require(self.threshold is None or self.threshold >= 0, "threshold", "0 or more, or None")
        self._require(self.num_attn_candidates >= 1, "num_attn_candidates", "1 or more")
        self._require(self.penalty_weights >= 0, "penalty_weights", "0 or more")
        self._require(self.window_size >= 1, "window_size", "1 or more")

    @property
    def is_identity(self) -> bool:
        return self.penalty_weights == 0 and self.threshold is None

    @property
    def candidates_per_beam(self) -> int:
        return self.num_attn_candidates

    def judge(self, attention: Tensor, image: Tensor, trail: Tensor) -> Judgement:
        trails = column_products(trail, attention, self.scale_factor)
        score, column = over_trust(trails)
        penalty = torch.zeros_like(score)
        if self.penalty_weights:  # an infinite score times 0 is no number
            penalty = self.penalty_weights * (-image if attention.shape[-1] <= FIRST_TOKENS else score)
        return Judgement(penalty, trails, mode(column))

    def retrospect(self, locations: Tensor, attempts: Mapping[int, int]) -> int | None:
        num = locations.shape[1]
        if self.threshold is None or num <= max(self.threshold, EARLIEST):
            return None  # decided without waiting for the device
        latest = mode(locations[:, -1])
        agreed = ((locations == latest).sum(dim=1) > self.threshold).all()
        column = int(torch.where(agreed, latest, -1))
        if column < EARLIEST:
            return None
        step = column + 1
        if attempts.get(step, 0) >= self.num_attn_candidates:
            step -= 1
        worn_out = attempts.get(step, 0) >= self.num_attn_candidates
        return None if worn_out or step >= self.window_size or num - step > self.window_size else step
