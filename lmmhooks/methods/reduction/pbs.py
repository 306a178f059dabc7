"""
PBS: permuted block-sparse attention for long prompts. Blocks of queries attend to the blocks of keys that matter.

Inside segments keys are put in the order in which the last queries of the prompt look at them, so that the few
important tokens of every frame come to lie in few blocks; means of blocks then say which blocks a block of queries
needs to cover a share ``threshold`` of its attention. Causality stays exact: a query sees a kept key if that key came
before it, wherever the key lies now.

Differs from the released code in that prompts without an image and decode steps stay dense, batches are read one prompt
at a time without their padding, and any architecture is served. It saves time on long prompts only: the kernels gain
nothing below some thousands of tokens, and attention is a small share of the work below about 16,000 (``min_tokens``).
The published speed-up (up to 2.75x) is UNVERIFIED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lmmhooks.cost import LayerCounts
from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.compute import ComputeContext, ComputeMethod, PromptTokens
from lmmhooks.methods.reduction.sparse import attend_blocks, row_blocks

__all__ = ["PBS", "attend_kept", "kept_blocks", "key_order", "pairs_kept"]


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
    for number, count in enumerate(most):
        rows = torch.arange(number * block, min((number + 1) * block, length), device=key.device)
        chosen = first[:, number, :count]
        kept = keep[:, number].gather(1, chosen)
        originals = held.gather(1, chosen[..., None].expand(-1, -1, block)).masked_fill(~kept[..., None], length)
        originals = originals.flatten(1)
        seen = originals[:, None] <= rows[:, None]
        at = originals.clamp(max=length - 1)
        output[:, rows] = scaled_dot_product_attention(
            query[None, :, rows], key[owner, at][None], value[owner, at][None], attn_mask=seen[None], scale=scaling
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


@dataclass(frozen=True)
class PBS(ComputeMethod):
    """Permuted block-sparse attention (see the module docstring); ``permute=False`` is mean-pooled top-p blocks."""

    id: ClassVar[str] = "pbs"
    paper: ClassVar[str] = "Sparser Block-Sparse Attention via Token Permutation, arXiv 2510.21270"
    code: ClassVar[str] = "https://github.com/xinghaow99/pbs-attn"

    threshold: float = setting(
        0.9, help="Share of a query block's attention that its kept blocks cover, in (0, 1]; 1 leaves nothing out."
    )
    block: int = setting(128, help="Tokens of a block, >= 1.")
    segment: int = setting(
        256,
        help="Tokens inside which keys are permuted, a multiple of block. Prompts up to this long are read densely.",
    )
    permute: bool = setting(True, help="Put keys in the order of their importance; False: blocks as they come.")
    pooling: Literal["mean", "max"] = setting(
        "mean", help="What stands for a block when blocks are compared; 'max' is UNVERIFIED."
    )
    frame_aligned: bool = setting(
        False,
        help="Segments as long as a frame: the smallest multiple of block that holds the tokens of the largest crop or "
        "frame, but at least `segment`. An extension, UNVERIFIED.",
    )
    text_dense: bool = setting(False, help="Text rows see everything before them. An extension, UNVERIFIED.")
    dense_layers: int = setting(0, help="First decoder layers left dense, >= 0; 2 is suggested (UNVERIFIED).")
    min_tokens: int = setting(0, help="Shorter prompts are read densely, >= 0; 16000 is where time can be gained.")
    kernel: Literal["gather", "flex"] = setting(
        "gather",
        help="'gather': fused attention of every block over its gathered keys, on any device; 'flex': FlexAttention, "
        "whose compiled form on CUDA has NOT been tested.",
    )

    def __post_init__(self) -> None:
        self._require(0 < self.threshold <= 1, "threshold", "in (0, 1]")
        self._require(self.block >= 1, "block", ">= 1")
        self._require(self.segment >= 1 and self.segment % self.block == 0, "segment", f"a multiple of {self.block}")
        self._require(self.pooling in ("mean", "max"), "pooling", "'mean' or 'max'")
        self._require(self.dense_layers >= 0, "dense_layers", ">= 0")
        self._require(self.min_tokens >= 0, "min_tokens", ">= 0")
        self._require(self.kernel in ("gather", "flex"), "kernel", "'gather' or 'flex'")

    def check(self, family: Any) -> None:
        self._require(self.dense_layers <= family.num_layers, "dense_layers", f"at most {family.num_layers}")

    @property
    def is_identity(self) -> bool:
        return self.threshold == 1

    def sparse_layers(self, family: Any) -> Sequence[int]:
        return range(self.dense_layers, family.num_layers)

    def segment_of(self, tokens: PromptTokens) -> int:
        """Tokens of a segment for a prompt."""
        if not self.frame_aligned:
            return self.segment
        frames = torch.stack([tokens.image, tokens.crop])[:, tokens.crop >= 0]
        sizes = frames.unique(dim=1, return_counts=True)[1]
        largest = int(sizes.max()) if len(sizes) else 0
        return max(self.segment, -(-largest // self.block) * self.block)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: ComputeContext) -> Tensor | None:
        length, plan = query.shape[1], context.plan
        if "segment" not in plan:
            plan["segment"] = self.segment_of(context.tokens)
        segment = plan["segment"]
        if length <= segment or length < self.min_tokens:
            return None
        scaling, block = context.scaling, self.block
        order = torch.arange(length, device=query.device).expand(query.shape[0], -1)
        if self.permute:
            order = key_order(query, key, scaling, block, segment)
        keep = kept_blocks(query, key, order, scaling, block, segment, self.threshold, self.pooling)
        dense = ~context.tokens.visual if self.text_dense else None
        context.memory[context.layer, context.sample] = pairs_kept(keep, length, block, segment, dense)
        attend = attend_kept if self.kernel == "gather" else attend_flex
        output = attend(query, key, value, order, keep, scaling, block)
        if self.text_dense:
            if "text" not in plan:
                plan["text"] = [rows for rows in row_blocks(context.tokens, None).blocks if not rows.visual]
            exact = attend_blocks(query, key, value, scaling, plan["text"])
            output = torch.where(context.tokens.visual[:, None], output, exact)
        return output

    def layer_counts(
        self, family: Any, layer: int, sample: int, tokens: PromptTokens, memory: dict[Any, Any]
    ) -> LayerCounts:
        if (layer, sample) not in memory:
            return LayerCounts.dense(len(tokens))
        return LayerCounts.block_sparse(len(tokens), float(memory[layer, sample]))
