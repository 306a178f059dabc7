"""
A-shape: the plainest sparse prefill. Every row sees the first tokens and a window of those before it; the last rows,
which ask the question, see everything.

The baseline that block-sparse methods such as `pbs` have to beat: it costs nothing to select, and knows nothing of what
it leaves out. The sizes are a control's, not a paper's: UNVERIFIED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.cost import LayerCounts
from lmmhooks.methods.base import setting
from lmmhooks.methods.reduction.compute import ComputeContext, ComputeMethod, PromptTokens
from lmmhooks.methods.reduction.sparse import ROW_BLOCK, RowBlock, attend_blocks

__all__ = ["AShape", "window_blocks"]


def window_blocks(
    length: int, sink: int, window: int, last: int, device: torch.device | None = None, size: int = ROW_BLOCK
) -> list[RowBlock]:
    """
    Rows of a prompt as blocks over the keys they see.

    Parameters
    ----------
    length
        Tokens of the prompt, n.
    sink, window
        A row sees the first ``sink`` tokens and the ``window`` tokens that end with itself.
    last
        Rows at the end that see everything before them.
    device
        Of the answer.
    size
        Rows of a block.
    """
    blocks = []
    for rows in torch.arange(length, device=device).split(size):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        first = 0 if stop > length - last else max(min(sink, stop), start - window + 1)
        keys = torch.cat([torch.arange(min(sink, first), device=device), torch.arange(first, stop, device=device)])
        near = (keys < sink) | (rows[:, None] - keys < window) | (rows[:, None] >= length - last)
        blocks.append(RowBlock(rows, keys, near & (keys <= rows[:, None]), visual=False))
    return blocks


@dataclass(frozen=True)
class AShape(ComputeMethod):
    """First tokens, a window and dense last rows (see the module docstring)."""

    id: ClassVar[str] = "a-shape"
    paper: ClassVar[str] = "none; control"

    sink: int = setting(128, help="First tokens that every row sees, >= 0.")
    window: int = setting(1024, help="Tokens that a row sees up to and with itself, >= 1.")
    last_rows: int = setting(64, help="Rows at the end of the prompt that see everything, >= 0.")

    def __post_init__(self) -> None:
        self._require(self.sink >= 0, "sink", ">= 0")
        self._require(self.window >= 1, "window", ">= 1")
        self._require(self.last_rows >= 0, "last_rows", ">= 0")

    def sparse_layers(self, family: Any) -> Sequence[int]:
        return range(family.num_layers)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: ComputeContext) -> Tensor | None:
        if self._is_dense(query.shape[1]):
            return None
        if "rows" not in context.plan:
            context.plan["rows"] = window_blocks(
                query.shape[1], self.sink, self.window, self.last_rows, device=query.device
            )
        return attend_blocks(query, key, value, context.scaling, context.plan["rows"])

    def _is_dense(self, length: int) -> bool:
        return length <= max(self.sink + self.window, self.last_rows)

    def layer_counts(
        self, family: Any, layer: int, sample: int, tokens: PromptTokens, memory: dict[Any, Any]
    ) -> LayerCounts:
        num = len(tokens)
        if self._is_dense(num):
            return LayerCounts.dense(num)
        # A row that is not dense sees min(sink + window, all before it) keys.
        most, rows = self.sink + self.window, num - self.last_rows
        short = min(most, rows)
        seen = short * (short + 1) // 2 + (rows - short) * most + sum(range(rows + 1, num + 1))
        return LayerCounts.block_sparse(num, seen / (num * (num + 1) / 2))
