"""
Runs compute methods: visual rows pass a layer unchanged, or attention is answered over fewer pairs.

A frozen layer is left as it is. Hooks hand its query projection, output projection and feed-forward part the text rows
only and put zeros where visual rows were, so that the residual stream of those rows gets exactly nothing; its keys and
values are computed for all rows. Attention goes through the port of the attention engine, so that edits and probes of
text rows act in such layers as in any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.rows import RowPlan, apply_weights, hide, row_scores, take_rows, visible
from lmmhooks.errors import ModelError, PromptError
from lmmhooks.layout import Layout, Segment
from lmmhooks.methods.reduction.compute import ComputeContext, ComputeMethod, PromptTokens

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState, Stage

__all__ = ["ComputeEngine", "prompt_tokens"]

ROW_BLOCK = 512
"""Text rows whose weights exist at once where the backend takes no dense mask; bounds memory for long prompts."""


def prompt_tokens(layout: Layout) -> list[tuple[Tensor, PromptTokens]]:
    """
    The prompt of every row without padding and without what was generated; one transfer to the host.

    Returns
    -------
    list
        Per row, positions ``[n]`` long in the sequence, and what stands there; on the CPU.
    """
    segment = layout.segment.cpu()
    inside = (segment != Segment.PADDING) & (segment != Segment.GENERATED)
    prompts = []
    for sample in range(layout.batch):
        image, crop, row, col = torch.full((4, layout.length), -1)
        placed = True
        for span in layout.spans_of(sample):
            image[span.positions] = span.image
            for values, given in ((crop, span.tokens.crop), (row, span.tokens.row), (col, span.tokens.col)):
                values[span.positions] = given
            placed = placed and (not len(span) or bool(span.tokens.grids))
        at = inside[sample].nonzero().flatten()
        prompts.append((at, PromptTokens(image[at], crop[at], row[at], col[at], placed)))
    return prompts


class ComputeEngine:
    """
    Attaches the frozen layers of all compute methods of a model, and answers attention calls for the attention engine.

    Attributes
    ----------
    frozen, sparse
        Decoder layers of either kind, with the method that asked for it.

    Raises
    ------
    ModelError
        On construction, for decoders whose layers do not keep the parts apart that a frozen layer leaves out.
    """

    def __init__(self, runtime: Runtime, methods: Sequence[ComputeMethod]) -> None:
        self.runtime = runtime
        family = runtime.family
        self.frozen = {layer: method for method in methods for layer in method.frozen_layers(family)}
        self.sparse = {layer: method for method in methods for layer in method.sparse_layers(family)}
        self._parts = {
            layer: (
                ("query projection", family.query_projection_of(family.layers[layer])),
                ("output projection", family.output_projection_of(family.layers[layer])),
                ("feed-forward part", family.mlp_of(family.layers[layer])),
            )
            for layer in self.frozen
        }

    @property
    def layers(self) -> set[int]:
        """Decoder layers whose attention calls `answering` wants to see."""
        return {*self.frozen, *self.sparse}

    def attach(self, attachments: Attachments) -> None:
        """Hook the projections and feed-forward parts of frozen layers; attention is reached through `answering`."""
        for layer, parts in sorted(self._parts.items()):
            for what, module in parts:
                name = f"{what} of decoder layer {layer}"
                attachments.pre_hook(module, partial(self._text_only, layer), f"{name} (text rows)")
                attachments.hook(module, partial(self._zeros_elsewhere, layer), f"{name} (zeros elsewhere)")

    def answering(self, layer: int, state: PromptState, call: AttentionCall) -> AttentionCall:
        """The call, set up so that `AttentionCall.run_base` leaves out what its layer leaves out."""
        if not state.is_prefill or layer not in self.layers or not _has_image(state.stage_at(layer).layout):
            return call
        stage = state.stage_at(layer)
        if layer in self.sparse:
            method = self.sparse[layer]
            state.computing[layer] = method
            return replace(call, whole=partial(self._attend_sparse, layer, method, state, stage))
        plan = self._plan(stage)
        if plan is None:
            return call
        method = self.frozen[layer]
        state.computing[layer] = method
        return replace(call, whole=partial(_attend_text_rows, layer, method, stage, plan))

    # -- frozen layers ------------------------------------------------------------------------------------------------

    def _plan(self, stage: Stage) -> RowPlan | None:
        """The text rows of a prompt; None where there is no image, or nothing else."""
        return stage.rows(["text"], stage.layout.length) if _has_image(stage.layout) else None

    def _current_plan(self, layer: int) -> tuple[Stage, RowPlan] | None:
        state = self.runtime.current
        if state is None or not state.is_prefill:
            return None
        stage = state.stage_at(layer)
        plan = self._plan(stage)
        return None if plan is None else (stage, plan)

    def _text_only(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self._current_plan(layer)
        if found is None:
            return None
        _, plan = found
        name = None if args else next(iter(kwargs))
        states = args[0] if name is None else kwargs[name]
        index = plan.index.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        rows = states.gather(1, index)
        return ((rows, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: rows})

    def _zeros_elsewhere(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        found = self._current_plan(layer)
        if found is None:
            return None
        stage, plan = found
        if not isinstance(output, Tensor) or output.dim() != 3:
            raise ModelError(
                f"{type(module).__name__} in decoder layer {layer} does not return states [batch, length, width], so "
                f"visual rows cannot be left out of it; {self.frozen[layer].id} cannot freeze this layer"
            )
        return _scatter_rows(output, plan, stage.layout.length)

    # -- sparse layers ------------------------------------------------------------------------------------------------

    def _attend_sparse(
        self, layer: int, method: ComputeMethod, state: PromptState, stage: Stage, call: AttentionCall
    ) -> AttentionResult:
        """Every prompt of the batch on its own, without its padding."""
        _refuse_odd_logits(layer, method, call, "softcap", "s_aux")
        prompts = self._prompts(stage, call)
        answers: list[Tensor | None] = []
        for sample, (at, tokens) in enumerate(prompts):
            if not tokens.num_visual:
                answers.append(None)
                continue
            context = ComputeContext(
                layer=layer,
                family=self.runtime.family,
                sample=sample,
                tokens=tokens,
                scaling=call.scaling,
                memory=state.memory(method),
                plan=stage.scratch.setdefault(("plan", id(method), sample), {}),
            )
            query, key, value = (states[sample][:, at] for states in (call.query, call.key, call.value))
            answers.append(method.attend(query, key, value, context))
        if any(answer is None for answer in answers):
            output, weights = call.base(call.query, call.key, call.value, call.mask)
            if all(answer is None for answer in answers):
                return output, weights
            output = output.clone()
        else:
            batch, heads, length, _ = call.query.shape
            output = call.query.new_zeros(batch, length, heads, call.value.shape[-1])
        for sample, ((at, _), answer) in enumerate(zip(prompts, answers, strict=True)):
            if answer is not None:
                output[sample, at] = answer.transpose(0, 1)
        return output, None

    def _prompts(self, stage: Stage, call: AttentionCall) -> list[tuple[Any, PromptTokens]]:
        """What `prompt_tokens` knows, on the device of the call; rows that are all there as a slice."""
        device = call.query.device
        key = ("prompts", device)
        if key not in stage.scratch:
            _refuse_both_ways(stage.layout, call)
            length = stage.layout.length
            stage.scratch[key] = [
                (slice(0, length) if len(at) == length else at.to(device), tokens.to(device))
                for at, tokens in prompt_tokens(stage.layout)
            ]
        prompts: list[tuple[Any, PromptTokens]] = stage.scratch[key]
        return prompts


def _has_image(layout: Layout) -> bool:
    return any(len(span) for span in layout.spans)


def _scatter_rows(rows: Tensor, plan: RowPlan, length: int) -> Tensor:
    """Planned rows ``[B, R, ...]`` in their places of ``[B, N, ...]``, zeros elsewhere."""
    shape = (*plan.index.shape, *[1] * (rows.dim() - 2))
    index, real = plan.index.to(rows.device).view(shape), plan.real.to(rows.device).view(shape)
    room = rows.new_zeros(rows.shape[0], length, *rows.shape[2:])
    # Filling, not multiplying: a row of padding that saw nothing may hold no number.
    return room.scatter_(1, index.expand_as(rows), rows.masked_fill(~real, 0))


def _attend_text_rows(
    layer: int, method: ComputeMethod, stage: Stage, plan: RowPlan, call: AttentionCall
) -> AttentionResult:
    """Text rows over all keys: the model's own backend where it takes a dense mask, explicit weights elsewhere."""
    length = stage.layout.length
    # A cache of fixed length holds room for tokens that are still to come.
    keys, values = call.key[:, :, :length], call.value[:, :, :length]
    rows_at = plan.index.to(call.query.device)
    valid = stage.layout.valid.to(call.query.device) if stage.mask is not None else None

    def seen_by(index: Tensor) -> Tensor | None:
        return visible(call.dense_mask, index, call.query.shape[2], length, valid, causal=True)

    if call.backend in ("sdpa", "eager") and (call.mask is None or call.dense_mask is not None):
        allowed = seen_by(rows_at)
        if allowed is not None and call.backend == "eager" and allowed.dtype == torch.bool:
            lowest = torch.finfo(call.query.dtype).min
            allowed = torch.zeros_like(allowed, dtype=call.query.dtype).masked_fill_(~allowed, lowest)
        rows, _ = call.base(take_rows(call.query, rows_at), keys, values, allowed)
        return _scatter_rows(rows, plan, length), None
    _refuse_odd_logits(layer, method, call, "s_aux")
    softcap = call.kwargs.get("softcap")
    blocks = []
    for index in rows_at.split(ROW_BLOCK, dim=1):
        scores = row_scores(take_rows(call.query, index), keys, call.scaling, softcap)
        blocks.append(apply_weights(torch.softmax(hide(scores, seen_by(index)), dim=-1), values))
    return _scatter_rows(torch.cat(blocks, dim=2).transpose(1, 2), plan, length), None


def _refuse_odd_logits(layer: int, method: ComputeMethod, call: AttentionCall, *names: str) -> None:
    known = {"softcap": "squashes its attention logits", "s_aux": "adds learned sinks to its attention logits"}
    for name in names:
        if call.kwargs.get(name) is not None:
            raise ModelError(
                f"decoder layer {layer} {known[name]}, which attention without visual rows or pairs does not know; use "
                f"the model without {method.id}"
            )


def _refuse_both_ways(layout: Layout, call: AttentionCall) -> None:
    """Decoders whose images attend in both directions: leaving out pairs is described for causal ones."""
    span = next(span for span in layout.spans if len(span))
    mask = call.dense_mask
    if mask is None or len(span) < 2:
        return
    ahead = mask[min(span.sample, mask.shape[0] - 1), 0, span.start, span.stop - 1]
    if bool(ahead if ahead.dtype == torch.bool else ahead == 0):
        raise PromptError(
            "image tokens of this model see those that come after them; methods that leave out pairs of image tokens "
            "need a causal decoder"
        )
