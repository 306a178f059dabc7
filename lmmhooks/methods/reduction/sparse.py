"""
Attention in which every row sees some of the keys: blocks of rows over the keys that any of them sees.

Rows that lie close together see much the same keys, so a block is a small dense problem for the fused kernel. What is
left out costs nothing, on any device and without a kernel of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmmhooks.methods.reduction.compute import PromptTokens

__all__ = [
    "RowBlock",
    "RowBlocks",
    "attend_blocks",
    "earlier",
    "earlier_images",
    "neighbours",
    "no_pairs",
    "own",
    "row_blocks",
    "seen_keys",
]

ROW_BLOCK = 128
"""
Rows of one block. Few rows see few keys together (a window of a 24 x 24 grid: 8 to 10 grid rows for 128 rows), many
make large matrices.
"""

Pairs = Callable[[PromptTokens, Tensor], Tensor]
"""Tokens and visual rows ``[R]`` to the visual keys they see, ``[R, n]`` bool; columns of text do not matter."""


def no_pairs(tokens: PromptTokens, rows: Tensor) -> Tensor:
    """Visual tokens do not see each other, nor themselves."""
    return torch.zeros(len(rows), len(tokens), dtype=torch.bool, device=rows.device)


def own(tokens: PromptTokens, rows: Tensor) -> Tensor:
    """A visual token sees itself and no other."""
    return rows[:, None] == torch.arange(len(tokens), device=rows.device)


def earlier_images(tokens: PromptTokens, rows: Tensor) -> Tensor:
    """A visual token sees the images before its own."""
    return tokens.image[None] < tokens.image[rows][:, None]


def neighbours(tokens: PromptTokens, rows: Tensor, window: int, causal: bool) -> Tensor:
    """
    A visual token sees the cells around it in its own crop, and itself.

    Parameters
    ----------
    window
        Side of the square, in cells; what counts is ``(window - 1) // 2`` to every side.
    causal
        Only cells that come no later in the sequence.
    """
    reach = (window - 1) // 2
    same = (tokens.image[rows][:, None] == tokens.image) & (tokens.crop[rows][:, None] == tokens.crop)
    near = same & (tokens.crop >= 0)
    for place in (tokens.row, tokens.col):
        near &= (place[rows][:, None] - place).abs() <= reach
    near |= own(tokens, rows)
    return near & (torch.arange(len(tokens), device=rows.device) <= rows[:, None]) if causal else near


def earlier(tokens: PromptTokens, rows: Tensor) -> Tensor:
    """Keys that causality lets rows see, ``[R, n]`` bool."""
    return torch.arange(len(tokens), device=rows.device) <= rows[:, None]


def seen_keys(tokens: PromptTokens, rows: Tensor, pairs: Pairs) -> Tensor:
    """
    Keys that visual rows see.

    Parameters
    ----------
    tokens
        On the device of ``rows``.
    rows
        ``[R]`` long.
    pairs
        Decides which visual keys; text is seen as causality lets it be.

    Returns
    -------
    Tensor
        ``[R, n]`` bool. A row that would see nothing sees itself.
    """
    seen = torch.where(tokens.visual, pairs(tokens, rows), earlier(tokens, rows))
    return seen | (own(tokens, rows) & ~seen.any(dim=1, keepdim=True))


@dataclass(frozen=True, eq=False)
class RowBlock:
    """
    Rows that are computed together.

    Attributes
    ----------
    rows
        ``[R]`` long.
    keys
        ``[S]`` long: the keys that any of them sees.
    seen
        ``[R, S]`` bool; None when every row sees all of them.
    visual
        Whether the rows are visual; a block holds one kind.
    """

    rows: Tensor
    keys: Tensor
    seen: Tensor | None
    visual: bool


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """
    All rows of a prompt.

    Attributes
    ----------
    blocks
        Cover every row once.
    is_causal
        Every row sees all that causality lets it see, and no more.
    text_pairs, visual_pairs
        Text keys and visual keys that visual rows see, counted over rows.
    """

    blocks: tuple[RowBlock, ...]
    is_causal: bool
    text_pairs: int
    visual_pairs: int


def row_blocks(tokens: PromptTokens, pairs: Pairs | None, size: int = ROW_BLOCK) -> RowBlocks:
    """
    Divide a prompt into blocks; waits for the device, so keep the answer.

    Parameters
    ----------
    tokens
        On the device of the attention call.
    pairs
        As for `seen_keys`; None: causality alone.
    size
        Rows of a block.
    """
    blocks: list[RowBlock] = []
    is_causal, total, among = True, 0, 0
    for visual in (False, True):
        for rows in (tokens.visual == visual).nonzero().flatten().split(size):
            seen = causal = earlier(tokens, rows)
            if visual and pairs is not None:
                seen = seen_keys(tokens, rows, pairs)
                is_causal = is_causal and torch.equal(seen, causal)
            keys = seen.any(dim=0).nonzero().flatten()
            part = seen[:, keys]
            blocks.append(RowBlock(rows, keys, None if bool(part.all()) else part, visual))
            if visual:
                total += int(part.sum())
                among += int((part & tokens.visual[keys]).sum())
    return RowBlocks(tuple(blocks), is_causal, total - among, among)


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    blocks: Sequence[RowBlock],
    visual_heads: Tensor | None = None,
) -> Tensor:
    """
    Attention of all rows, block by block.

    Parameters
    ----------
    query
        ``[H, n, d]``.
    key, value
        ``[Hkv, n, d]``.
    scaling
        Factor on the dot products.
    blocks
        Of `row_blocks`.
    visual_heads
        ``[K]`` long: query heads in which visual rows attend at all; their output is 0 in the others. None: all.

    Returns
    -------
    Tensor
        ``[H, n, d]``.
    """
    output = query.new_zeros(*query.shape[:2], value.shape[-1])
    groups = query.shape[0] // key.shape[0]
    for block in blocks:
        if block.visual and visual_heads is not None:
            if not len(visual_heads):
                continue
            owner = visual_heads // groups
            keys, values = key[owner[:, None], block.keys], value[owner[:, None], block.keys]
            rows = query[visual_heads[:, None], block.rows]
            output[visual_heads[:, None], block.rows] = _fused(rows, keys, values, block.seen, scaling)
        else:
            keys, values = key[:, block.keys], value[:, block.keys]
            output[:, block.rows] = _fused(query[:, block.rows], keys, values, block.seen, scaling)
    return output


def _fused(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float) -> Tensor:
    """``[H, R, d]`` over ``[Hkv, S, d]`` under ``[R, S]``."""
    heads, rows, width = query.shape
    groups = heads // key.shape[0]
    # Folding the group into the rows spares the copies of keys and values that one per query head would be.
    folded = query.reshape(key.shape[0], groups * rows, width)
    mask = None if seen is None else seen.repeat(groups, 1)
    out = scaled_dot_product_attention(folded[None], key[None], value[None], attn_mask=mask, scale=scaling)
    return out.view(heads, rows, -1)
