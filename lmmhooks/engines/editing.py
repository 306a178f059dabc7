"""One attention call in one decoder layer under the edits of its methods: explicit rows, or a fused form of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.rows import RowPlan, apply_weights, hide, row_scores, take_rows, visible, visible_keys
from lmmhooks.engines.segments import SegmentCall
from lmmhooks.errors import ModelError
from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod, SegmentMethod

if TYPE_CHECKING:
    from lmmhooks.engines.companion import Companion
    from lmmhooks.engines.state import PromptState, Stage
    from lmmhooks.family import Family

__all__ = ["Edit", "RowReader"]

ROW_BLOCK = 512
"""Rows computed at once; bounds memory for methods that edit every row of a long prompt."""

FUSED_ROWS = 128
"""Edited rows from which on scaled keys go through the model's own backend instead of explicit weights."""


@dataclass(frozen=True)
class RowReader:
    """
    Reads attention weights of some rows of a call.

    Attributes
    ----------
    rows
        Named row selection (see `AttentionMethod.rows`).
    receive
        Called with weights ``[B, H, R, N]`` float32, ``[B, R]`` bool that is False for rows that are not its own,
        the rows' indices ``[B, R]`` and the call they belong to; once per block of rows.
    edited
        Whether it reads weights after the edits of the methods, or those the model would have without them.
    on_decode
        Whether it reads tokens that continue the prompt too.
    wanted
        Whether anybody listens now; None: always.
    """

    rows: str
    receive: Callable[[Tensor, Tensor, Tensor, Edit], None]
    edited: bool = True
    on_decode: bool = False
    wanted: Callable[[], bool] | None = None


@dataclass
class Edit:
    """
    One attention call in one decoder layer, with what the methods may look at.

    Attributes
    ----------
    companion
        The reading of the prompt without images that heads are compared with; None where no method asks for it, no
        row has an image, or the prompt has been read.
    """

    layer: int
    family: Family
    stage: Stage
    state: PromptState
    call: AttentionCall
    companion: Companion | None = None

    def __post_init__(self) -> None:
        self._segments: dict[int, SegmentCall] = {}
        if self.call.kwargs.get("s_aux") is not None:
            raise ModelError(
                f"decoder layer {self.layer} adds learned sinks to its attention logits, which edits do not know; "
                "use the model without attention methods"
            )
        # A cache of fixed length holds room for tokens that are still to come.
        self.keys = self.call.key[:, :, : self.stage.layout.length]
        self.values = self.call.value[:, :, : self.stage.layout.length]

    def context(self, method: AttentionMethod, rows: Tensor) -> AttentionContext:
        """What a method may look at; ``rows [B, R]`` are those of the tensors it is given."""
        return AttentionContext(
            layer=self.layer,
            family=self.family,
            layout=self.stage.layout,
            rows=rows,
            is_prefill=self.state.is_prefill,
            memory=self.state.memory(method),
            num_cached=self.keys.shape[2] - self.call.query.shape[2],
            prompt_length=self.state.layout.length,
            keys=self.keys,
            scaling=self.call.scaling,
            index=self.stage.index,
            weights_of=self.plain_weights,
        )

    def run(self, methods: Sequence[AttentionMethod], readers: Sequence[RowReader], plan: RowPlan) -> AttentionResult:
        """
        The call's result under all methods.

        Parameters
        ----------
        methods
            In the order in which their edits apply; none if the call is only read.
        readers
            Look at weights on the way.
        plan
            The union of the rows that methods and readers ask for.
        """
        if self.state.is_prefill:
            self._choose_segments(methods)
        if not readers and methods:
            kinds = frozenset().union(*(method.edits for method in methods))
            if kinds == {"scale_heads"}:
                return self._gains_only(methods, plan)
            if self.state.is_prefill and len(methods) == 1:
                [method] = methods
                if isinstance(method, SegmentMethod) and method.edits == {"edit_weights"}:
                    return self._segment(method)
                if kinds == {"scale_keys"} and (fused := self._scaled_keys(method, plan)) is not None:
                    return fused
        return self._recompute(methods, readers, plan)

    # -- explicit rows ------------------------------------------------------------------------------------------------

    def _recompute(
        self, methods: Sequence[AttentionMethod], readers: Sequence[RowReader], plan: RowPlan
    ) -> AttentionResult:
        """Explicit weights for the planned rows, fused attention for the others."""
        skip_base = plan.covers_all and bool(methods)
        output, dense = (None, None) if skip_base else self.call.run_base()
        blocks: list[Tensor] = []
        weights: Tensor | None = None
        moved: list[Tensor] = []
        for start in range(0, plan.num_rows, ROW_BLOCK):
            part = _slice(plan, start, start + ROW_BLOCK) if plan.num_rows > ROW_BLOCK else plan
            weights, before = self.explicit_weights(methods, part, any(not reader.edited for reader in readers))
            for reader in readers:
                seen = weights if reader.edited or before is None else before
                reader.receive(seen, part.members[reader.rows], part.index, self)
            if methods:
                blocks.append(apply_weights(weights, self.values))
                if before is not None and self.state.is_prefill:
                    moved.append((weights - before).abs().sum(dim=-1).mul(0.5).mean(dim=1))
        if not methods:
            return output, dense  # type: ignore[return-value] # the base ran: there is nothing to skip it for
        if moved:
            self._record_moved(torch.cat(moved, dim=1), plan.real)
        edited = torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]
        edited = self._apply_gains(methods, plan, edited)
        if output is None:
            # One block holds the weights of all rows, so output_attentions keeps working where the base returns them.
            return edited.transpose(1, 2).contiguous(), weights if len(blocks) == 1 else None
        return put_back(output, edited, plan), dense

    def explicit_weights(
        self, methods: Sequence[AttentionMethod], plan: RowPlan, before: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """
        Weights ``[B, H, R, N]`` of the planned rows, with and without the edits of the methods.

        The second is None where nobody needs it: at decode, and without methods (then it would be the first).
        """
        scores, allowed = self._scores(plan.index)
        measure = bool(methods) and (before or self.state.is_prefill)
        unedited = torch.softmax(hide(scores.clone(), allowed), dim=-1) if measure else None
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
        return weights, unedited

    def plain_weights(self, index: Tensor) -> Tensor:
        """Weights ``[B, H, R, N]`` without edits of rows ``index [B, R]``, whether any method edits them or not."""
        return torch.softmax(hide(*self._scores(index)), dim=-1)

    def _scores(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of rows ``index [B, R]`` before masking, and what each of them may see."""
        queries = take_rows(self.call.query, index)
        scores = row_scores(queries, self.keys, self.call.scaling, self.call.kwargs.get("softcap"))
        return scores, self._visible(index)

    def _visible(self, index: Tensor) -> Tensor | None:
        valid = self.stage.layout.valid if self.stage.mask is not None else None
        queries, keys = self.call.query.shape[2], self.keys.shape[2]
        return visible(self.call.dense_mask, index, queries, keys, valid, causal=True)

    def _visible_keys(self, keys: Tensor) -> Tensor:
        valid = self.stage.layout.valid if self.stage.mask is not None else None
        return visible_keys(self.call.dense_mask, keys, self.call.query.shape[2], self.keys.shape[2], valid)

    # -- fused forms --------------------------------------------------------------------------------------------------

    def _gains_only(self, methods: Sequence[AttentionMethod], plan: RowPlan) -> AttentionResult:
        """Only head gains: no weights are needed, so every row stays fused."""
        output, weights = self.call.run_base()
        rows = output.transpose(1, 2)
        if not plan.covers_all:
            rows = take_rows(rows, plan.index)
        edited = self._apply_gains(methods, plan, rows)
        return put_back(output, edited, plan), weights

    def _segment(self, method: SegmentMethod) -> AttentionResult:
        """A few keys against all others: the row's output is a combination of two that need no weights."""
        output, weights = self.call.run_base()
        chosen = self.state.memory(method)[self.layer]
        edited, moved = self._segments[id(method)].reweight(output, chosen, method)
        self._record_moved(moved, self.stage.layout.valid)
        return edited, weights

    def _scaled_keys(self, method: AttentionMethod, plan: RowPlan) -> AttentionResult | None:
        """
        Factors on keys: ``q . (c k) = c (q . k)``, so the model's backend answers the edited rows over scaled keys.

        None where that is no gain or cannot be said to the backend: few rows, factors per head where heads share keys,
        masks of other forms.
        """
        base_takes_rows = self.call.backend in ("sdpa", "eager") and (
            self.call.mask is None or self.call.dense_mask is not None
        )
        if plan.num_rows < FUSED_ROWS or not base_takes_rows or self.call.kwargs.get("softcap") is not None:
            return None
        factor = method.scale_keys(self.context(method, plan.index))
        if factor is None:
            return self.call.run_base()
        if factor.dim() == 2:
            factor = factor[:, None]
        elif factor.shape[1] != self.keys.shape[1]:
            return None
        allowed = self._visible(plan.index)
        if allowed is not None and self.call.backend == "eager" and allowed.dtype == torch.bool:
            allowed = torch.zeros_like(allowed, dtype=self.call.query.dtype).masked_fill_(
                ~allowed, torch.finfo(self.call.query.dtype).min
            )
        scaled = (self.keys.float() * factor[..., None]).to(self.keys.dtype)
        rows, _ = self.call.base(take_rows(self.call.query, plan.index), scaled, self.values, allowed)
        # Weights exist for one row only, so what was moved is measured there.
        if (last := self.stage.rows(["last"], self.call.query.shape[2])) is not None:
            alone = RowPlan(last.index, last.real, {method.rows: last.real}, covers_all=False)
            after, before = self.explicit_weights([method], alone)
            assert before is not None
            self._record_moved((after - before).abs().sum(dim=-1).mul(0.5).mean(dim=1), alone.real)
        if plan.covers_all:
            return rows, None
        output, weights = self.call.run_base()
        return put_back(output, rows.transpose(1, 2), plan), weights

    # -- what methods decide on the way -------------------------------------------------------------------------------

    def _choose_segments(self, methods: Sequence[AttentionMethod]) -> None:
        """Let methods choose their sets, by the attention keys receive before any edit of this layer."""
        for method in methods:
            if isinstance(method, SegmentMethod):
                heads = method.edited_heads(self.layer, self.family)
                segments = SegmentCall(self.call, self.keys, self.values, heads, self._visible, self._visible_keys)
                received, seen = segments.received(self.stage.layout.valid)
                self._segments[id(method)] = segments
                self.state.memory(method)[self.layer] = method.choose(received, seen, self.context(method, seen[:, :0]))

    def _apply_gains(self, methods: Sequence[AttentionMethod], plan: RowPlan, outputs: Tensor) -> Tensor:
        scaling = [method for method in methods if "scale_heads" in method.edits]
        if not scaling:
            return outputs
        queries = self.call.query if plan.covers_all else take_rows(self.call.query, plan.index)
        for method in scaling:
            context = self.context(method, plan.index)
            if method.contrasts_text and self.companion is not None:
                self._compare_heads(self.companion, method, plan, outputs, context)
            gain = method.scale_heads(queries, outputs, context)
            if gain is not None:
                outputs = _only(plan, method, outputs, outputs * gain.to(outputs.dtype))
        return outputs

    def _compare_heads(
        self,
        companion: Companion,
        method: AttentionMethod,
        plan: RowPlan,
        outputs: Tensor,
        context: AttentionContext,
    ) -> None:
        # Planned rows ascend, so the last real one of a sample is its last position.
        last = (plan.real.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        with_image = take_rows(outputs, last)[:, :, 0]
        companion.advance(self.layer, lambda without: method.choose_heads(with_image, without, context))

    def _record_moved(self, distance: Tensor, real: Tensor) -> None:
        self.state.moved[self.layer] = (distance * real).sum() / real.sum()


def put_back(output: Tensor, edited: Tensor, plan: RowPlan) -> Tensor:
    """Write edited rows ``[B, H, R, d]`` into an attention output ``[B, Nq, H, d]``; filler rows write nothing."""
    edited = edited.transpose(1, 2).to(output.dtype)
    if plan.covers_all:
        return edited.contiguous()
    # Fillers are rows nobody edits: they get back what they hold. Selecting the others would wait for the device.
    index = plan.index[:, :, None, None].expand_as(edited)
    return output.scatter(1, index, torch.where(plan.real[:, :, None, None], edited, output.gather(1, index)))


def _only(plan: RowPlan, method: AttentionMethod, before: Tensor, after: Tensor) -> Tensor:
    """Keep an edit to the rows the method asked for, when others were planned beside them."""
    if len(plan.members) == 1:
        return after
    return torch.where(plan.members[method.rows][:, None, :, None], after, before)


def _input(plan: RowPlan, method: AttentionMethod, values: Tensor) -> Tensor:
    """A method may edit in place; hand it a copy when rows that are not its own, or a graph, must survive."""
    return values if len(plan.members) == 1 and not values.requires_grad else values.clone()


def _slice(plan: RowPlan, start: int, stop: int) -> RowPlan:
    members = {name: mask[:, start:stop] for name, mask in plan.members.items()}
    return RowPlan(plan.index[:, start:stop], plan.real[:, start:stop], members, covers_all=False)
