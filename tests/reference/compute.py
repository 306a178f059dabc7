"""
Methods that compute less, the slow way: the whole model without cache, one query of one head at a time.

Visual rows of frozen layers are computed like all others and then overwritten. A decode step is rendered as one forward
over prompt and answer so far; what methods do to the prompt, they do to its columns there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

#: (layer, row of the batch, head, query) -> keys it sees, or None for all up to itself; positions are columns
See = Callable[[int, int, int, int], "list[int] | None"]
#: (layer, row of the batch, head, query, keys, weights of these keys) -> weights
Weigh = Callable[[int, int, int, int, "list[int]", Tensor], Tensor]
#: (layer, queries, keys, values of a prompt without padding, [H, n, d] each) -> output [H, n, d], or None for causal
Whole = Callable[[int, Tensor, Tensor, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class Prompts:
    """Columns of a batch of prompts, found on ids alone, with the cells of visual tokens where they are known."""

    ids: Tensor
    visual_ids: Collection[int]
    cells: dict[tuple[int, int], tuple[int, int, int, int]]
    """(row of the batch, column) to (image, crop, row, column) of the cell; newlines have crop -1."""

    def kind(self, sample: int, column: int) -> str:
        if column >= self.ids.shape[1]:
            return "text"
        token = int(self.ids[sample, column])
        return "padding" if token == 0 else "visual" if token in self.visual_ids else "text"

    def columns(self, sample: int) -> list[int]:
        return [c for c in range(self.ids.shape[1]) if self.kind(sample, c) != "padding"]

    def visual(self, sample: int) -> list[int]:
        return [c for c in self.columns(sample) if self.kind(sample, c) == "visual"]


def split_rows(prompts: Prompts, layers: Collection[int], inside: Callable[[int, int, int], bool]) -> See:
    """Visual rows see earlier text and, of visual keys, those that ``inside(sample, query, key)`` allows."""

    def see(layer: int, sample: int, head: int, query: int) -> list[int] | None:
        if layer not in layers or prompts.kind(sample, query) != "visual":
            return None
        keys = []
        for key in prompts.columns(sample):
            among = prompts.kind(sample, key) == "visual"
            if inside(sample, query, key) if among else key < query:
                keys.append(key)
        return keys or [query]

    return see


def near(prompts: Prompts, window: int, causal: bool) -> Callable[[int, int, int], bool]:
    """Cells of one crop no further apart than half a window; anything sees itself."""
    reach = int((window - 1) / 2)

    def inside(sample: int, query: int, key: int) -> bool:
        one, other = prompts.cells[sample, query], prompts.cells[sample, key]
        if query == key:
            return True
        if causal and key > query:
            return False
        same = one[:2] == other[:2] and one[1] >= 0
        return same and abs(one[2] - other[2]) <= reach and abs(one[3] - other[3]) <= reach

    return inside


@contextmanager
def rendered(
    model: Any,
    prompts: Prompts,
    *,
    see: See | None = None,
    weigh: Weigh | None = None,
    whole: Whole | None = None,
    frozen: Collection[int] = (),
) -> Iterator[None]:
    """Run the decoder with attention computed query by query, and visual rows of ``frozen`` layers overwritten."""
    text = model.model.language_model

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        groups, layer = q.shape[1] // k.shape[1], module.layer_idx
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = torch.zeros_like(q)
        for sample in range(q.shape[0]):
            live = [c for c in range(q.shape[2]) if prompts.kind(sample, c) != "padding"]
            for head in range(q.shape[1]):
                for query in live:
                    keys = see(layer, sample, head, query) if see else None
                    if keys is None:
                        keys = [c for c in live if c <= query]
                    scores = k[sample, head, keys] @ q[sample, head, query] * kwargs["scaling"]
                    weights = torch.softmax(scores.float(), dim=0)
                    if weigh is not None:
                        weights = weigh(layer, sample, head, query, keys, weights)
                    out[sample, head, query] = weights @ v[sample, head, keys]
            at = prompts.columns(sample)
            if whole and (answer := whole(layer, q[sample, :, at], k[sample, :, at], v[sample, :, at])) is not None:
                out[sample, :, at] = answer
        return out.transpose(1, 2).contiguous(), None

    def overwrite(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        before = args[0] if args else kwargs["hidden_states"]
        output = output.clone()
        for sample in range(output.shape[0]):
            for column in prompts.visual(sample):
                output[sample, column] = before[sample, column]
        return output

    # Registered under a name of the tests; transformers has no way to take a name out again.
    AttentionInterface.register("test_compute", attend)
    AttentionMaskInterface.register("test_compute", eager_mask)
    name = text.config._attn_implementation
    hooks = [text.layers[layer].register_forward_hook(overwrite, with_kwargs=True) for layer in frozen]
    text.config._attn_implementation_internal = "test_compute"
    try:
        yield
    finally:
        text.config._attn_implementation_internal = name
        for hook in hooks:
            hook.remove()


def pbs(
    q: Tensor, k: Tensor, v: Tensor, block: int, segment: int, threshold: float, permute: bool = True, mean: bool = True
) -> tuple[Tensor, list[list[int]], list[list[set[int]]]]:
    """
    Permuted block-sparse attention, one head and one query at a time, on ``[H, n, d]`` (keys as many as queries).

    Returns the output, per head the order of keys, and per head and query block the kept key blocks.
    """
    heads, n, width = q.shape
    scale = 1 / math.sqrt(width)
    out, orders, kept = torch.zeros_like(v), [], []
    for h in range(heads):
        whole = n // segment * segment
        received = torch.softmax((q[h, -block:] @ k[h, :whole].T * scale).float(), dim=1).mean(dim=0).tolist()
        order: list[int] = []
        for start in range(0, whole, segment):
            inside = list(range(start, start + segment))
            order += sorted(inside, key=lambda j: (-received[j], j)) if permute else inside
        order += range(whole, n)
        orders.append(order)
        number = -(-n // block)

        def pool(states: Tensor, number: int = number) -> Tensor:
            padded = torch.cat([states, torch.zeros(number * block - n, width)])
            parts = [padded[i * block : (i + 1) * block] for i in range(number)]
            return torch.stack([part.mean(dim=0) if mean else part.max(dim=0).values for part in parts])

        scores = pool(q[h]) @ pool(k[h][order]).T * scale
        per = segment // block
        rows = []
        for i in range(number):
            earlier = [j for j in range(i + 1) if j // per != i // per]
            keep = {j for j in range(number) if j // per == i // per} | {order.index(0) // block}
            if earlier:
                probability = torch.softmax(scores[i, earlier].float(), dim=0).tolist()
                chosen, total = [], 0.0
                for p, j in sorted(zip(probability, earlier, strict=True), key=lambda pair: (-pair[0], pair[1])):
                    chosen.append(j)
                    total += p
                    if total >= threshold:
                        keep |= set(chosen)
                        break
            rows.append(keep)
        kept.append(rows)
        for i in range(n):
            keys = [j for place, j in enumerate(order) if place // block in rows[i // block] and j <= i]
            weights = torch.softmax((k[h, keys] @ q[h, i] * scale).float(), dim=0)
            out[h, i] = weights @ v[h, keys]
    return out, orders, kept
