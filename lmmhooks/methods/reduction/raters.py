"""Text tokens that may judge visual tokens, and what they say (SparseVLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from lmmhooks.layout import Layout
from lmmhooks.methods.probe import Probe, RowsRead

__all__ = [
    "EMBEDDINGS",
    "RATERS",
    "choose_raters",
    "gravity",
    "judged",
    "judged_per_head",
    "judged_per_row",
    "raters",
]

EMBEDDINGS = Probe("decoder_states", 0)


def choose_raters(embeddings: Tensor, layout: Layout) -> Tensor:
    """
    Text tokens that have to do with the image.

    Parameters
    ----------
    embeddings
        ``[B, N, D]`` what enters the decoder.
    layout
        Of it.

    Returns
    -------
    Tensor
        ``[B, N]`` bool: text behind the first image whose share of the visual tokens' softmax over that text exceeds
        the mean; all of that text where none does.
    """
    text, visual = layout.after_image, layout.visual
    # Text is short and the image is not: one number from the device spares a matrix of N x N.
    most = int(text.sum(dim=1).max())
    index = text.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    real = text.gather(1, index)
    embeddings = embeddings.float()
    picked = embeddings.gather(1, index[..., None].expand(-1, -1, embeddings.shape[-1]))
    logits = (embeddings @ picked.transpose(1, 2)).masked_fill(~real[:, None], torch.finfo(torch.float32).min)
    counted = visual[..., None] / visual.sum(dim=1).clamp(min=1)[:, None, None]
    relevance = (torch.softmax(logits, dim=-1) * counted).sum(dim=1) * real
    mean = relevance.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)
    above = (relevance > mean) & real
    chosen = torch.where(above.any(dim=1, keepdim=True), above, real)
    return torch.zeros_like(text).scatter(1, index, chosen)


def raters(read: RowsRead) -> Tensor:
    """Raters and positions ``[B, 2, N]``: 1 for raters, and the number of a token among those that are no padding."""
    if read.memory:
        # What blocks of rows return is summed; raters do not depend on rows.
        return read.weights.new_zeros(read.weights.shape[0], 2, read.weights.shape[3])
    read.memory["read"] = True
    chosen = choose_raters(read.read(EMBEDDINGS), read.layout)
    position = (read.layout.valid.cumsum(dim=1) - 1).clamp(min=0)
    return torch.stack([chosen, position], dim=1).to(read.weights.dtype)


RATERS = Probe("decoder_rows", 0, "last", reduce=raters, label="raters")
"""Carries the raters to deeper layers, whose sequences are shorter."""


def _rows(read: RowsRead) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of the block are raters ``[B, R]``, the number of raters ``[B, 1]``, and all positions ``[B, N]``."""
    chosen, position = read.read(RATERS).unbind(dim=-1)
    rows = (chosen.gather(1, read.rows) > 0) & read.members
    return rows, chosen.sum(dim=1, keepdim=True).clamp(min=1), position


def judged(read: RowsRead) -> Tensor:
    """Attention of raters, mean over raters and heads: ``[B, N]``."""
    rows, number, _ = _rows(read)
    return ((rows / number)[:, None] @ read.weights.mean(dim=1))[:, 0]


def judged_per_row(read: RowsRead) -> Tensor:
    """Attention of every rater, mean over heads: ``[B, T, N]``, a row of zeros for text that is no rater."""
    rows, _, _ = _rows(read)
    text = read.layout.after_image
    most = int(text.sum(dim=1).max())
    slot = (text.cumsum(dim=1) - 1).clamp(min=0).gather(1, read.rows)
    weights = read.weights.mean(dim=1) * rows[..., None]
    out = weights.new_zeros(weights.shape[0], most, weights.shape[2])
    return out.scatter_add(1, slot.clamp(max=most - 1)[..., None].expand_as(weights), weights)


def judged_per_head(read: RowsRead, correct: bool, least: float) -> Tensor:
    """
    Attention of raters per head, mean over raters: ``[B, H, N]``.

    Parameters
    ----------
    read
        The block of rows.
    correct
        Divide by what rotary embedding alone makes of the distance (`gravity`).
    least
        Divisors below are raised to it.
    """
    rows, number, position = _rows(read)
    weights = read.weights
    if correct:
        # Positions are those of the whole prompt, of which other cuts may have left little.
        if "longest" not in read.memory:
            read.memory["longest"] = int(position.max()) + 1
        factors = gravity(read, read.memory["longest"]).clamp(min=least)
        distance = (position.gather(1, read.rows)[..., None] - position[:, None]).clamp(min=0).long()
        weights = weights / factors[distance][:, None]
    return ((rows / number)[:, None, None] @ weights)[:, :, 0]


def gravity(read: RowsRead, longest: int) -> Tensor:
    """
    Logit of equal queries and keys at distances below ``longest`` under one-dimensional rotary embedding.

    1/sqrt(d) is included: ``[longest]``.

    ``2 / sqrt(d)`` times the sum of the cosines of distance times frequency; falls with distance, and below zero far
    away.
    """
    places = torch.arange(longest, device=read.weights.device)[None]
    cosines, _ = read.family.text_model.rotary_emb.forward(read.weights, places)
    return cosines[0].sum(dim=-1) / cosines.shape[-1] ** 0.5
