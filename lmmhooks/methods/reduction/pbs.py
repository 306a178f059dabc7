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

from lmmhooks.cost import LayerCounts
from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.compute import ComputeContext, ComputeMethod, PromptTokens
from lmmhooks.methods.reduction.permuting import attend_flex, attend_kept, kept_blocks, key_order, pairs_kept
from lmmhooks.methods.reduction.sparse import attend_blocks, row_blocks

__all__ = ["PBS"]


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
