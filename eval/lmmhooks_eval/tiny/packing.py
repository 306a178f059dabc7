"""Packed training: many questions about one image share its prefix in one forward pass.

Layout of a row: the prefix (begin tokens, image, newline), then slots of fixed length that hold one question with its
answer each. A slot attends to the prefix and causally to itself, and its positions continue from the prefix, so every
slot is exactly the single-turn prompt that inference uses. Attention is computed in two blocks (prefix, own slot)
instead of with a dense mask, which would spend most of its time on masked entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PACKED_ATTENTION = "lmmhooks_tiny_packed"
"""Name under which `packed_attention` is registered with transformers."""
SHORT_ATTENTION = "lmmhooks_tiny_short"
"""Name of `short_attention`."""
WINDOW_ATTENTION = "lmmhooks_tiny_window_flash"
"""Name of `window_attention`; it contains "flash" so that Qwen2.5-VL hands over all windows in one call."""
IGNORE = -100
"""Label of positions without loss, as in transformers."""


@dataclass(frozen=True)
class Packing:
    """Where prefix and slots lie in a packed row.

    Parameters
    ----------
    prefix
        Number of prefix tokens.
    groups
        ``(slots, length)`` of every run of slots of equal length, in order.
    """

    prefix: int
    groups: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens in a packed row."""
        return self.prefix + sum(slots * length for slots, length in self.groups)

    def slot_starts(self) -> list[tuple[int, int]]:
        """``(start, length)`` of every slot, in tokens from the beginning of the row."""
        starts, at = [], self.prefix
        for slots, length in self.groups:
            for _ in range(slots):
                starts.append((at, length))
                at += length
        return starts

    def slot_offsets(self) -> Tensor:
        """int64 ``(length - prefix,)``: position of every slot token counted from the end of the prefix."""
        return torch.cat([torch.arange(length).repeat(slots) for slots, length in self.groups])

    def dense_mask(self) -> Tensor:
        """bool ``(length, length)``: True where a query row may attend; for tests and as the definition."""
        allowed = torch.zeros(self.length, self.length, dtype=torch.bool)
        allowed[: self.prefix, : self.prefix] = torch.ones(self.prefix, self.prefix, dtype=torch.bool).tril()
        for start, length in self.slot_starts():
            allowed[start : start + length, : self.prefix] = True
            allowed[start : start + length, start : start + length] = torch.ones(length, length).bool().tril()
        return allowed


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers that follows a `Packing`; softmax in float32.

    Parameters
    ----------
    query
        ``(B, H, N, d)`` after rotary embedding.
    key, value
        ``(B, Hkv, N, d)``; ``H`` is a multiple of ``Hkv``.
    packing
        Layout of the rows, handed through the model's forward as keyword argument; ``N`` is its length.

    Returns
    -------
    tuple
        ``(B, N, H, d)`` and None.

    Raises
    ------
    ValueError
        If the forward was called without ``packing``.
    """
    if packing is None:
        raise ValueError("packed attention needs packing=Packing(...) as keyword argument of the model's forward")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embedding leaves float32 under autocast
    groups_per_key = query.shape[1] // key.shape[1]
    if groups_per_key > 1:
        key, value = (states.repeat_interleave(groups_per_key, dim=1) for states in (key, value))
    prefix = packing.prefix
    prefix_keys, prefix_values = key[:, :, :prefix], value[:, :, :prefix]
    outputs = [_attend(query[:, :, :prefix], prefix_keys, prefix_values, scaling, is_causal=True)]
    at = prefix
    for slots, length in packing.groups:
        own = slice(at, at + slots * length)
        outputs.append(
            _slot_attention(
                query[:, :, own], prefix_keys, prefix_values, key[:, :, own], value[:, :, own], slots, length, scaling
            )
        )
        at += slots * length
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _slot_attention(
    query: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    key: Tensor,
    value: Tensor,
    slots: int,
    length: int,
    scaling: float | None,
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefix = prefix_keys.shape[2]
    own_query, own_key, own_value = (states.unflatten(2, (slots, length)) for states in (query, key, value))
    to_prefix = (query @ prefix_keys.transpose(-1, -2)).unflatten(2, (slots, length))  # (B, H, slots, length, prefix)
    to_own = own_query @ own_key.transpose(-1, -2)  # (B, H, slots, length, length)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    to_own = to_own.masked_fill(future, float("-inf"))
    weights = torch.softmax(torch.cat([to_prefix, to_own], dim=-1).float() * scale, dim=-1).to(value.dtype)
    from_prefix = weights[..., :prefix].flatten(2, 3) @ prefix_values
    from_own = weights[..., prefix:] @ own_value
    return from_prefix + from_own.flatten(2, 3)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, is_causal: bool = False) -> Tensor:
    # Written out, because the backward pass of fused attention on a CPU takes several times as long at 64 tokens.
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.softmax(scores.float() * scale, dim=-1).to(value.dtype) @ value


def short_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention over short sequences without padding; for the CLIP tower."""
    return _attend(query, key, value, scaling).transpose(1, 2), None


def window_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention inside equally long windows, all in one call; for Qwen2.5-VL's vision tower.

    The stock path without FlashAttention loops over windows in Python, which costs more than the attention itself for
    windows of 64 patches.

    Parameters
    ----------
    query, key, value
        ``(1, H, N, d)``.
    cu_seq_lens_q
        Cumulative window lengths ``(windows + 1,)``; windows are equally long because all images are.
    """
    if cu_seq_lens_q is None:
        raise ValueError("window attention needs cu_seq_lens_q, which only the FlashAttention call path passes")
    windows = cu_seq_lens_q.shape[0] - 1
    query, key, value = (
        states[0].unflatten(1, (windows, -1)).transpose(0, 1).to(value.dtype) for states in (query, key, value)
    )
    output = _attend(query, key, value, scaling)  # (windows, H, length, d)
    return output.transpose(1, 2).flatten(0, 1)[None], None


def register_attention() -> None:
    """Make the attention functions known to transformers; called by training, never at import."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionInterface.register(SHORT_ATTENTION, short_attention)
    AttentionInterface.register(WINDOW_ATTENTION, window_attention)


def pack_rows(
    packing: Packing, prefix_ids: Sequence[int], rows: Sequence[Sequence[tuple[list[int], list[int]]]], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Lay out tokenised questions of a batch.

    Parameters
    ----------
    packing
        The layout; ``len(prefix_ids) == packing.prefix``.
    rows
        Per image, per slot: token ids of the question and of the answer with its end token. Fewer entries than slots
        leave the remaining slots empty.
    pad_id
        Filler, after the answer only, so that causal attention never lets it reach a label.

    Returns
    -------
    tuple of Tensor
        int64 ids and labels, ``(B, packing.length)`` each. ``labels[:, i]`` is what the state at position i predicts
        (already shifted), `IGNORE` elsewhere.

    Raises
    ------
    ValueError
        If a question does not fit its slot.
    """
    ids = torch.full((len(rows), packing.length), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), packing.length), IGNORE, dtype=torch.long)
    ids[:, : packing.prefix] = torch.tensor(list(prefix_ids))
    starts = packing.slot_starts()
    for row, slots in enumerate(rows):
        for (start, length), (question, answer) in zip(starts, slots, strict=False):
            tokens = question + answer
            if len(tokens) > length:
                raise ValueError(f"question and answer have {len(tokens)} tokens but the slot holds {length}")
            ids[row, start : start + len(tokens)] = torch.tensor(tokens)
            first = start + len(question) - 1
            labels[row, first : first + len(answer)] = torch.tensor(answer)
    return ids, labels
