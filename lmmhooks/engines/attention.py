"""
Runs attention methods: fused attention for all rows, exact recomputation of the few rows that are edited or read.

At prefill the model's own backend computes every row; the rows a method edits (text rows after the image, or the last
row) are computed again from q, K and V with explicit weights and put in their place. Memory grows as rows x keys. At
decode the one new row is computed directly and the fused call is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import AttentionCall, AttentionResult, Port, route
from lmmhooks.engines.rows import (
    RowPlan,
    apply_weights,
    hide,
    received_attention,
    row_scores,
    take_rows,
    visible,
)
from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState, Stage

__all__ = ["AttentionEngine", "DecoderProbe", "VisionProbe"]

ROW_BLOCK = 512
"""Rows computed at once; bounds memory for methods that edit every row of a long prompt."""


@dataclass(frozen=True)
class DecoderProbe:
    """
    Reads attention weights of prompt rows of one decoder layer, after any edits, while the prompt is read.

    Attributes
    ----------
    layer
        Decoder layer, 0-based.
    rows
        Named row selection (see `AttentionMethod.rows`).
    receive
        Called with weights ``[B, H, R, N]`` float32 and ``[B, R]`` bool that is False for filler rows.
    """

    layer: int
    rows: str
    receive: Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class VisionProbe:
    """
    Reads attention in one layer of the vision tower.

    Attributes
    ----------
    layer
        Vision layer, 0-based.
    kind
        ``"cls"``: the row of the class token, ``[crops, H, patches]`` without the class column, not renormalised.
        ``"received"``: mean over query rows, ``[crops, H, patches]``; class row and column left out where there is one.
    receive
        Called once per attention call: once per crop batch (CLIP-like), once per image or window (Qwen-like).
    """

    layer: int
    kind: str
    receive: Callable[[Tensor], None]


class AttentionEngine:
    """Attaches ports to the attention modules that some method edits or some probe reads, and serves their calls."""

    def __init__(
        self,
        runtime: Runtime,
        methods: Sequence[AttentionMethod],
        decoder_probes: Sequence[DecoderProbe] = (),
        vision_probes: Sequence[VisionProbe] = (),
    ) -> None:
        self.runtime = runtime
        family = runtime.family
        self.edits: dict[int, list[AttentionMethod]] = defaultdict(list)
        self.observers: dict[int, list[AttentionMethod]] = defaultdict(list)
        self.decoder_probes: dict[int, list[DecoderProbe]] = defaultdict(list)
        self.vision_probes: dict[int, list[VisionProbe]] = defaultdict(list)
        for method in methods:
            for layer in method.layers(family):
                self.edits[layer].append(method)
                if method.observes:
                    self.observers[layer].append(method)
        for probe in decoder_probes:
            self.decoder_probes[probe.layer].append(probe)
        for seen in vision_probes:
            self.vision_probes[seen.layer].append(seen)

    def attach(self, attachments: Attachments) -> None:
        """Hook everything the methods and probes need; nothing else is touched."""
        family = self.runtime.family
        text_layers = sorted({*self.edits, *self.decoder_probes})
        if text_layers:
            modules = {layer: family.attention_of(family.layers[layer]) for layer in text_layers}
            # The mask is built from the model's configuration and the call dispatched by the module's: name both.
            route(attachments, [family.text_model.config, *(module.config for module in modules.values())])
            for layer, module in modules.items():
                handler = partial(self._attend_text, layer)
                attachments.pre_hook(module, Port(handler), f"attention of decoder layer {layer}")
        for layer in sorted(self.observers):
            attachments.pre_hook(family.layers[layer], _bind_hook(self._observe, layer), f"input of layer {layer}")
        if self.vision_probes:
            towers = {layer: family.attention_of(family.vision_layers[layer]) for layer in sorted(self.vision_probes)}
            route(attachments, [module.config for module in towers.values()])
            for layer, module in towers.items():
                handler = partial(self._attend_vision, layer)
                attachments.pre_hook(module, Port(handler), f"attention of vision layer {layer}")

    def _observe(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.runtime.current
        if state is None or not state.is_prefill:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        stage = state.stage_at(layer)
        nothing = torch.empty(hidden.shape[0], 0, dtype=torch.long, device=hidden.device)
        for method in self.observers[layer]:
            method.observe(hidden, self._context(method, layer, stage, state, nothing))

    def _context(
        self, method: AttentionMethod, layer: int, stage: Stage, state: PromptState, rows: Tensor
    ) -> AttentionContext:
        return AttentionContext(
            layer=layer,
            family=self.runtime.family,
            layout=stage.layout,
            rows=rows,
            is_prefill=state.is_prefill,
            memory=state.memory(method),
        )

    def _attend_text(self, layer: int, call: AttentionCall) -> AttentionResult:
        state = self.runtime.current
        methods = [m for m in self.edits[layer] if state is not None and (state.is_prefill or m.on_decode) and m.edits]
        probes = self.decoder_probes[layer] if state is not None and state.is_prefill else []
        if state is None or not (methods or probes):
            return call.run_base()
        stage = state.stage_at(layer)
        plan = stage.rows([*(m.rows for m in methods), *(p.rows for p in probes)], call.query.shape[2])
        if plan is None:
            return call.run_base()
        edit = _Edit(self, layer, stage, state, call)
        if not probes and not any(m.edits - {"scale_heads"} for m in methods):
            return edit.gain_only(methods, plan)
        return edit.recompute(methods, probes, plan)

    def _attend_vision(self, layer: int, call: AttentionCall) -> AttentionResult:
        has_cls = self.runtime.family.has_cls
        for start, stop in _segments(call.kwargs.get("cu_seq_lens_q"), call.query.shape[2]):
            q, k = call.query[:, :, start:stop], call.key[:, :, start:stop]
            for probe in self.vision_probes[layer]:
                if probe.kind == "cls":
                    weights = torch.softmax(row_scores(q[:, :, :1], k, call.scaling), dim=-1)
                    probe.receive(weights[:, :, 0, 1:])
                else:
                    rows = q[:, :, 1:] if has_cls else q
                    received = received_attention(rows, k, call.scaling)
                    probe.receive(received[:, :, 1:] if has_cls else received)
        return call.run_base()


@dataclass
class _Edit:
    """One attention call in one decoder layer, with what the methods may look at."""

    engine: AttentionEngine
    layer: int
    stage: Stage
    state: PromptState
    call: AttentionCall

    def context(self, method: AttentionMethod, rows: Tensor) -> AttentionContext:
        return self.engine._context(method, self.layer, self.stage, self.state, rows)

    def gain_only(self, methods: Sequence[AttentionMethod], plan: RowPlan) -> AttentionResult:
        """Only head gains: no weights are needed, so every row stays fused."""
        output, weights = self.call.run_base()
        rows = output.transpose(1, 2)
        if not plan.covers_all:
            rows = take_rows(rows, plan.index)
        queries = self.call.query if plan.covers_all else take_rows(self.call.query, plan.index)
        edited = self.apply_gains(methods, plan, queries, rows)
        return self.put_back(output, edited, plan), weights

    def recompute(
        self,
        methods: Sequence[AttentionMethod],
        probes: Sequence[DecoderProbe],
        plan: RowPlan,
    ) -> AttentionResult:
        """Explicit weights for the planned rows, fused attention for the others."""
        skip_base = plan.covers_all and bool(methods)
        output, dense = (None, None) if skip_base else self.call.run_base()
        blocks: list[Tensor] = []
        weights: Tensor | None = None
        for start in range(0, plan.num_rows, ROW_BLOCK):
            part = _slice(plan, start, start + ROW_BLOCK) if plan.num_rows > ROW_BLOCK else plan
            queries, weights = self.explicit_weights(methods, part)
            for probe in probes:
                probe.receive(weights, part.members[probe.rows])
            if methods:
                blocks.append(self.apply_gains(methods, part, queries, apply_weights(weights, self.call.value)))
        if not methods:
            return output, dense  # type: ignore[return-value] # the base ran: there is nothing to skip it for
        edited = torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]
        if output is None:
            # One block holds the weights of all rows, so output_attentions keeps working where the base returns them.
            return edited.transpose(1, 2).contiguous(), weights if len(blocks) == 1 else None
        return self.put_back(output, edited, plan), dense

    def explicit_weights(self, methods: Sequence[AttentionMethod], plan: RowPlan) -> tuple[Tensor, Tensor]:
        call = self.call
        queries = take_rows(call.query, plan.index)
        scores = row_scores(queries, call.key, call.scaling)
        valid = self.stage.layout.valid if self.stage.mask is not None else None
        dense = call.mask if isinstance(call.mask, Tensor) and call.mask.dim() == 4 else None
        allowed = visible(dense, plan.index, call.query.shape[2], call.key.shape[2], valid, causal=True)
        measure = self.state.is_prefill and bool(methods)
        before = torch.softmax(hide(scores.clone(), allowed), dim=-1) if measure else None
        for method in methods:
            context = self.context(method, plan.index)
            if "scale_keys" in method.edits and (factor := method.scale_keys(context)) is not None:
                factor = factor[:, None, None, :] if factor.dim() == 2 else factor[:, :, None, :]
                scores = _only(plan, method, scores, scores * factor)
        scores = hide(scores, allowed)
        for method in methods:
            if "edit_scores" in method.edits:
                edited = method.edit_scores(_input(plan, method, scores), self.context(method, plan.index))
                scores = _only(plan, method, scores, edited)
        weights = torch.softmax(scores, dim=-1)
        for method in methods:
            if "edit_weights" in method.edits:
                edited = method.edit_weights(_input(plan, method, weights), self.context(method, plan.index))
                weights = _only(plan, method, weights, edited)
        if before is not None:
            distance = (weights - before).abs().sum(dim=-1).mul(0.5).mean(dim=1)
            self.state.moved[self.layer] = (distance * plan.real).sum() / plan.real.sum()
        return queries, weights

    def apply_gains(
        self, methods: Sequence[AttentionMethod], plan: RowPlan, queries: Tensor, outputs: Tensor
    ) -> Tensor:
        for method in methods:
            if "scale_heads" in method.edits:
                gain = method.scale_heads(queries, outputs, self.context(method, plan.index))
                if gain is not None:
                    outputs = _only(plan, method, outputs, outputs * gain.to(outputs.dtype))
        return outputs

    @staticmethod
    def put_back(output: Tensor, edited: Tensor, plan: RowPlan) -> Tensor:
        """Write edited rows ``[B, H, R, d]`` into an attention output ``[B, Nq, H, d]``; filler rows write nothing."""
        edited = edited.transpose(1, 2).to(output.dtype)
        if plan.covers_all:
            return edited.contiguous()
        sample, row = plan.real.nonzero(as_tuple=True)
        return output.index_put((sample, plan.index[sample, row]), edited[sample, row])


def _only(plan: RowPlan, method: AttentionMethod, before: Tensor, after: Tensor) -> Tensor:
    """Keep an edit to the rows the method asked for, when others were planned beside them."""
    if len(plan.members) == 1:
        return after
    return torch.where(plan.members[method.rows][:, None, :, None], after, before)


def _input(plan: RowPlan, method: AttentionMethod, values: Tensor) -> Tensor:
    """A method may edit in place; hand it a copy when rows that are not its own must survive."""
    return values if len(plan.members) == 1 else values.clone()


def _slice(plan: RowPlan, start: int, stop: int) -> RowPlan:
    members = {name: mask[:, start:stop] for name, mask in plan.members.items()}
    return RowPlan(plan.index[:, start:stop], plan.real[:, start:stop], members, covers_all=False)


def _segments(boundaries: Tensor | None, length: int) -> list[tuple[int, int]]:
    """Spans of packed sequences in a variable-length flash call; the whole call otherwise."""
    if boundaries is None:
        return [(0, length)]
    cuts = boundaries.tolist()
    return list(pairwise(cuts))


def _bind_hook(function: Callable[..., None], layer: int) -> Callable[..., None]:
    return lambda module, args, kwargs: function(layer, args, kwargs)
