"""
Block-sparse attention with permuted keys: the mathematics of `pbs`.

Shapes: n tokens of one prompt, H query heads, Hkv key heads, d width of a head, M blocks of tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

__all__ = ["attend_flex", "attend_kept", "kept_blocks", "key_order", "pairs_kept"]


def key_order(query: Tensor, key: Tensor, scaling: float, block: int, segment: int) -> Tensor:
    """
    The order in which keys are dealt out to blocks.

    Parameters
    ----------
    query
        ``[H, n, d]``; the last ``block`` of them judge, without a causal mask.
    key
        ``[Hkv, n, d]``.
    scaling
        Factor on the dot products.
    block, segment
        In tokens; a segment is a multiple of a block.

    Returns
    -------
    Tensor
        ``[H, n]`` long: original index of the key at every place. A permutation inside every whole segment, the most
        looked at first; what is left over at the end keeps its order.
    """
    heads, length = query.shape[:2]
    whole = length // segment * segment
    judges = query[:, -block:].reshape(key.shape[0], -1, query.shape[2])
    weights = torch.softmax((judges @ key[:, :whole].transpose(1, 2) * scaling).float(), dim=-1)
    received = weights.view(heads, -1, whole // segment, segment).mean(dim=1)
    inside = received.sort(dim=-1, descending=True, stable=True).indices
    starts = torch.arange(0, whole, segment, device=query.device)[:, None]
    rest = torch.arange(whole, length, device=query.device).expand(heads, -1)
    return torch.cat([(inside + starts).flatten(1), rest], dim=1)


def kept_blocks(
    query: Tensor,
    key: Tensor,
    order: Tensor,
    scaling: float,
    block: int,
    segment: int,
    threshold: float,
    pooling: Literal["mean", "max"] = "mean",
) -> Tensor:
    """
    The blocks of keys that every block of queries looks at.

    Parameters
    ----------
    query, key, scaling, block, segment
        As for `key_order`.
    order
        Its answer.
    threshold
        Share of a query block's attention to other segments, estimated from pooled blocks, that kept blocks cover.
        Where rounding keeps the sum below it, none of them is kept.
    pooling
        What stands for a block.

    Returns
    -------
    Tensor
        ``[H, M, M]`` bool for M blocks, the last one filled up with zeros. The block that holds the first token and all
        blocks of a query's own segment are always kept.
    """
    heads, length = order.shape
    owner = torch.arange(heads, device=key.device)[:, None] // (heads // key.shape[0])
    pooled = []
    for states in (query, key[owner, order]):
        padded = pad(states, (0, 0, 0, -length % block)).unflatten(1, (-1, block))
        pooled.append(padded.mean(dim=2) if pooling == "mean" else padded.amax(dim=2))
    scores = (pooled[0] @ pooled[1].transpose(1, 2) * scaling).float()
    number = torch.arange(scores.shape[1], device=key.device)
    part = number // (segment // block)
    earlier = part[None] < part[:, None]
    same = part[None] == part[:, None]
    sink = (order == 0).int().argmax(dim=1) // block
    always = same | (number == sink[:, None])[:, None]
    if threshold >= 1:
        return always | earlier
    # Rows without an earlier segment have nothing to weigh: their softmax is no number.
    weights = torch.softmax(scores.masked_fill(~earlier, float("-inf")), dim=-1).nan_to_num(0.0)
    best = weights.sort(dim=-1, descending=True, stable=True)
    covered = best.values.cumsum(dim=-1)
    # The shortest prefix whose sum reaches the threshold: places before which it was still short.
    wanted = (pad(covered, (1, -1)) < threshold) & (covered[..., -1:] >= threshold)
    keep = torch.zeros_like(wanted).scatter(2, best.indices, wanted)
    return (keep & earlier) | always


def attend_kept(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, keep: Tensor, scaling: float, block: int
) -> Tensor:
    """
    Attention over kept blocks: every block of queries over its own keys, gathered.

    Parameters
    ----------
    query, key, value, scaling, block
        As for `key_order`.
    order, keep
        What `key_order` and `kept_blocks` answered.

    Returns
    -------
    Tensor
        ``[H, n, d]``. Memory is that of the keys and values of one block of queries. Waits for the device once.
    """
    heads, length = order.shape
    owner = torch.arange(heads, device=key.device)[:, None] // (heads // key.shape[0])
    # Places past the end hold a key that comes after every query.
    held = pad(order, (0, -length % block), value=length).unflatten(1, (-1, block))
    first = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    most: list[int] = keep.sum(dim=-1).amax(dim=0).tolist()
    output = query.new_empty(heads, length, value.shape[-1])
    # One index into all heads' keys at once, and a mask that is added: each twice as fast as the obvious form.
    flat_keys, flat_values = (states.reshape(-1, states.shape[-1]) for states in (key, value))
    nothing, lowest = query.new_zeros(()), query.new_full((), float("-inf"))
    for number, count in enumerate(most):
        rows = torch.arange(number * block, min((number + 1) * block, length), device=key.device)
        chosen = first[:, number, :count]
        kept = keep[:, number].gather(1, chosen)
        originals = held.gather(1, chosen[..., None].expand(-1, -1, block)).masked_fill(~kept[..., None], length)
        originals = originals.flatten(1)
        mask = torch.where(originals[:, None] <= rows[:, None], nothing, lowest)
        at = originals.clamp(max=length - 1) + owner * length
        keys, values = (s.index_select(0, at.flatten()).view(1, *at.shape, -1) for s in (flat_keys, flat_values))
        output[:, rows] = scaled_dot_product_attention(
            query[None, :, rows], keys, values, attn_mask=mask[None], scale=scaling
        )[0]
    return output


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, keep: Tensor, scaling: float, block: int
) -> Tensor:
    """The same in one kernel of FlexAttention; compiled on CUDA, where this has NOT been run, plain elsewhere."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    heads, length = order.shape
    room = -length % block
    owner = torch.arange(heads, device=key.device)[:, None] // (heads // key.shape[0])
    held = pad(order, (0, room), value=length)
    queries = pad(query, (0, 0, 0, room))[None]
    keys, values = (pad(states[owner, order], (0, 0, 0, room))[None] for states in (key, value))

    def seen(sample: Tensor, head: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return keep[head, row // block, place // block] & (held[head, place] <= row)

    number = keep.sum(dim=-1, dtype=torch.int32)[None]
    first = keep.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)[None]
    mask = BlockMask.from_kv_blocks(number, first, BLOCK_SIZE=block, mask_mod=seen)
    kernel = torch.compile(flex_attention) if query.is_cuda else flex_attention
    return kernel(queries, keys, values, block_mask=mask, scale=scaling)[0, :, :length]


def pairs_kept(keep: Tensor, length: int, block: int, segment: int, dense: Tensor | None = None) -> Tensor:
    """
    Share of the causal pairs that is computed, a scalar: blocks of earlier segments are seen whole.

    ``dense [n]`` bool marks rows that see everything before them.
    """
    part = torch.arange(keep.shape[1], device=keep.device) // (segment // block)
    rows = torch.arange(length, device=keep.device)
    whole = (keep & (part[None] < part[:, None])).sum(dim=-1).float().mean(dim=0) * block
    pairs = whole[rows // block] + rows % segment + 1
    if dense is not None:
        pairs = torch.where(dense, rows + 1, pairs)
    return pairs.sum() / (length * (length + 1) / 2)
