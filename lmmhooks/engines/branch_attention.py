"""Attention of branch rows where a method defines it; main rows keep what the model and other methods make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.probing import transport
from lmmhooks.engines.rows import hide, row_scores, take_rows, visible
from lmmhooks.engines.state import PromptState, Stage
from lmmhooks.errors import ModelError
from lmmhooks.layout import Layout
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import BranchAttention

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["BranchAttender"]


class BranchAttender:
    """
    Lets a method answer attention calls for the rows of its branches.

    Attributes
    ----------
    layers
        Decoder layers in which it does.
    rows
        Rows of the current forward by branch name; the engine that stacks the rows says which they are.
    """

    def __init__(self, runtime: Runtime, method: DecodingMethod, branches: Sequence[Branch]) -> None:
        self.runtime = runtime
        self.method = method
        self.branches = list(branches)
        self.layers = frozenset(method.branch_layers(runtime.family)) if branches else frozenset()
        self.rows: dict[str, slice] = {}

    @property
    def hides(self) -> bool:
        """Whether it hides keys from branches."""
        return bool(self.layers) and type(self.method).hide_keys is not DecodingMethod.hide_keys

    def follow(self, num_rows: int, num_blocks: int) -> None:
        """The coming forward has that many blocks of rows, the branches last; without main there is one fewer."""
        first = num_blocks - len(self.branches)
        self.rows = {
            branch.name: slice((first + i) * num_rows, (first + i + 1) * num_rows)
            for i, branch in enumerate(self.branches)
            if first >= 0
        }

    def hide(self, layer: int, state: PromptState, call: AttentionCall) -> AttentionCall:
        """The call, with the keys hidden that a method hides from its branches."""
        if not self.hides:
            return call
        stage = state.stage_at(layer)
        hidden = {}
        for branch in self.branches:
            if (rows := self.rows.get(branch.name)) is not None:
                keys = self.method.hide_keys(self._view(layer, state, stage, call, branch, rows), branch)
                if keys is not None:
                    hidden[branch.name] = keys
        if not hidden:
            return call
        before, mask = stage.scratch.get("mask without hidden keys", ({}, None))
        if before.keys() != hidden.keys() or any(before[name] is not keys for name, keys in hidden.items()):
            mask = _mask(call, stage, [(self.rows[name], keys) for name, keys in hidden.items()])
            stage.scratch["mask without hidden keys"] = hidden, mask
        return replace(call, mask=mask)

    def answer(self, layer: int, state: PromptState, call: AttentionCall, result: AttentionResult) -> AttentionResult:
        """The result of a call, with the rows of branches as the method wants them."""
        if type(self.method).attend is DecodingMethod.attend:
            return result
        stage = state.stage_at(layer)
        output, weights = result
        for branch in self.branches:
            if (rows := self.rows.get(branch.name)) is not None:
                attended = self.method.attend(self._view(layer, state, stage, call, branch, rows), branch)
                if attended is not None:
                    output = output.clone() if output is result[0] else output
                    output[rows] = attended.transpose(1, 2).to(output.dtype)
        return output, weights

    def _view(
        self, layer: int, state: PromptState, stage: Stage, call: AttentionCall, branch: Branch, rows: slice
    ) -> BranchAttention:
        key = "rows of a branch", branch.name
        if key not in stage.scratch:
            stage.scratch[key] = _cut(stage.layout, rows)
        layout: Layout = stage.scratch[key]
        mask = call.mask
        if isinstance(mask, Tensor) and mask.shape[0] == call.query.shape[0]:
            mask = mask[rows]
        own = replace(
            call,
            query=call.query[rows],
            key=call.key[rows, :, : layout.length],
            value=call.value[rows, :, : layout.length],
            mask=mask,
            whole=None,
        )
        # Kept on the first stage, which every layer of the forward shares.
        memory = state.stages[0].scratch.setdefault(("memory of a branch", branch.name), {})
        return BranchAttention(
            query=own.query,
            key=own.key,
            value=own.value,
            layer=layer,
            layout=layout,
            is_prefill=state.is_prefill,
            prompt_length=layout.length - state.grown,
            keep_for_later=partial(_note, memory, stage),
            from_earlier=partial(_recall, memory, stage, state, rows),
            weights_of=partial(_weights, own, layout, stage.mask is not None),
            plain=partial(_plain, own),
        )


def _cut(layout: Layout, rows: slice) -> Layout:
    spans = (replace(s, sample=s.sample - rows.start) for s in layout.spans if rows.start <= s.sample < rows.stop)
    return Layout(layout.segment[rows], tuple(spans))


def _allowed(call: AttentionCall, layout: Layout, padded: bool, rows: Tensor) -> Tensor | None:
    valid = layout.valid if padded else None
    return visible(call.dense_mask, rows, call.query.shape[2], layout.length, valid, causal=True)


def _weights(call: AttentionCall, layout: Layout, padded: bool, rows: Tensor) -> Tensor:
    scores = row_scores(take_rows(call.query, rows), call.key, call.scaling, call.kwargs.get("softcap"))
    return torch.softmax(hide(scores, _allowed(call, layout, padded, rows)), dim=-1)


def _plain(call: AttentionCall) -> Tensor:
    return call.run_base()[0].transpose(1, 2)


def _mask(call: AttentionCall, stage: Stage, hidden: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """The mask of a call, as its backend wants it, with more keys hidden from some of its rows."""
    if call.backend not in ("sdpa", "eager"):
        raise ModelError(
            f"attention backend {call.backend!r} takes no mask in which branches hide keys of their own; load the "
            "model with attn_implementation='sdpa'"
        )
    batch, _, queries, _ = call.query.shape
    rows = torch.arange(queries, device=call.query.device).expand(batch, -1)
    allowed = _allowed(call, stage.layout, stage.mask is not None, rows)
    if allowed is None:
        allowed = torch.ones(batch, 1, queries, stage.layout.length, dtype=torch.bool, device=call.query.device)
    allowed = allowed.expand(batch, -1, -1, -1).clone()
    lowest = torch.finfo(call.query.dtype).min
    for where, keys in hidden:
        allowed[where] = allowed[where].masked_fill(keys[:, None], False if allowed.dtype == torch.bool else lowest)
    if allowed.dtype == torch.bool and call.backend == "eager":
        return torch.zeros_like(allowed, dtype=call.query.dtype).masked_fill_(~allowed, lowest)
    return allowed


def _note(memory: dict[Any, Any], stage: Stage, name: str, values: Tensor) -> None:
    memory[name] = stage, values


def _recall(memory: dict[Any, Any], stage: Stage, state: PromptState, rows: slice, name: str) -> Tensor:
    seen, values = memory[name]
    if seen is stage:
        return values
    # A reducer cut in between; what followed the prompt stands at the end of both sequences.
    length = state.layout.length
    before = None if seen.index is None else seen.index[rows]
    assert stage.index is not None
    wanted = stage.index[rows]
    prompt = values[..., : values.shape[-1] - state.grown]
    moved = transport(prompt.transpose(1, 2), length, before, wanted).transpose(1, 2)
    values = torch.cat([moved, values[..., values.shape[-1] - state.grown :]], dim=-1)
    memory[name] = stage, values
    return values
