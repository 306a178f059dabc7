"""
Runs attention methods: fused attention for all rows, exact recomputation of the few rows that are edited or read.

At prefill the model's own backend computes every row; the rows a method edits (text rows after the image, or the last
row) are computed again from q, K and V with explicit weights and put in their place. Memory grows as rows x keys. At
decode the one new row is computed directly and the fused call is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import AttentionCall, AttentionResult, Port, route
from lmmhooks.engines.editing import Edit, RowReader
from lmmhooks.engines.preparing import show_weights, watched_beforehand, watched_on_the_way
from lmmhooks.engines.probes import DecoderProbe, VisionProbe
from lmmhooks.engines.rows import received_attention, row_scores
from lmmhooks.errors import ModelError
from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod

if TYPE_CHECKING:
    from lmmhooks.engines.branch_attention import BranchAttender
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.skipping import ComputeEngine
    from lmmhooks.engines.state import PromptState
    from lmmhooks.family import Family

__all__ = ["AttentionEngine"]


class AttentionEngine:
    """Attaches ports to the attention modules that some method edits or some probe reads, and serves their calls."""

    def __init__(
        self,
        runtime: Runtime,
        methods: Sequence[AttentionMethod],
        decoder_probes: Sequence[DecoderProbe] = (),
        vision_probes: Sequence[VisionProbe] = (),
        listened: Iterable[int] = (),
        compute: ComputeEngine | None = None,
        branches: BranchAttender | None = None,
    ) -> None:
        self.runtime = runtime
        family = runtime.family
        self.edits: dict[int, list[AttentionMethod]] = defaultdict(list)
        self.observers: dict[int, list[AttentionMethod]] = defaultdict(list)
        self.readers: dict[int, list[RowReader]] = defaultdict(list)
        self.vision_probes: dict[int, list[VisionProbe]] = defaultdict(list)
        self.listened: set[int] = set(listened)
        """Layers that are read outside the forward that reads the prompt."""
        self.compute = compute
        self.branches = branches
        for method in methods:
            for layer in method.layers(family):
                self.edits[layer].append(method)
                if method.observes:
                    self.observers[layer].append(method)
            for layer, rows in watched_on_the_way(method, family).items():
                self.readers[layer].append(RowReader(rows, partial(self._watch, method, layer), edited=False))
            self.listened.update(watched_beforehand(method, family))
        for probe in decoder_probes:
            receive = probe.hears or _weights_only(probe.receive)
            self.readers[probe.layer].append(
                RowReader(probe.rows, receive, on_decode=probe.on_decode, wanted=probe.wanted)
            )
        for seen in vision_probes:
            # A reducer and an attention method may ask for the same signal.
            if seen not in self.vision_probes[seen.layer]:
                self.vision_probes[seen.layer].append(seen)

    def attach(self, attachments: Attachments) -> None:
        """Hook everything the methods and probes need; nothing else is touched."""
        family = self.runtime.family
        computed = self.compute.layers if self.compute else ()
        branched = self.branches.layers if self.branches else ()
        text_layers = sorted({*self.edits, *self.readers, *self.listened, *computed, *branched})
        if text_layers:
            _refuse_windows(family, text_layers)
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
        for method in self.observers[layer]:
            context = AttentionContext(
                layer=layer,
                family=self.runtime.family,
                layout=stage.layout,
                rows=torch.empty(hidden.shape[0], 0, dtype=torch.long, device=hidden.device),
                is_prefill=True,
                memory=state.memory(method),
                prompt_length=state.layout.length,
                index=stage.index,
            )
            method.observe(hidden, context)

    def _attend_text(self, layer: int, call: AttentionCall) -> AttentionResult:
        state = self.runtime.current
        if state is None:
            listener = self.runtime.listeners.get(layer)
            return listener(call) if listener else call.run_base()
        if self.branches is None or layer not in self.branches.layers:
            return self._attend_rows(layer, state, call)
        call = self.branches.hide(layer, state, call)
        return self.branches.answer(layer, state, call, self._attend_rows(layer, state, call))

    def _attend_rows(self, layer: int, state: PromptState, call: AttentionCall) -> AttentionResult:
        if self.compute is not None:
            call = self.compute.answering(layer, state, call)
        methods = [m for m in self.edits[layer] if (state.is_prefill or m.on_decode) and m.edits]
        readers = [
            reader
            for reader in self.readers[layer]
            if (state.is_prefill or reader.on_decode) and (reader.wanted is None or reader.wanted())
        ]
        if not (methods or readers):
            return call.run_base()
        stage = state.stage_at(layer)
        names = [*(m.rows for m in methods), *(r.rows for r in readers)]
        plan = stage.rows(names, call.query.shape[2], is_prefill=state.is_prefill)
        if plan is None:
            return call.run_base()
        return Edit(layer, self.runtime.family, stage, state, call, state.companion).run(methods, readers, plan)

    def _watch(
        self, method: AttentionMethod, layer: int, weights: Tensor, real: Tensor, rows: Tensor, edit: Edit
    ) -> None:
        assert self.runtime.current is not None
        show_weights(self.runtime.family, self.runtime.current, method, layer, weights, real, rows, edit)

    def _attend_vision(self, layer: int, call: AttentionCall) -> AttentionResult:
        first = int(self.runtime.family.has_cls)
        for start, stop in _segments(call.kwargs.get("cu_seq_lens_q"), call.query.shape[2]):
            q, k = call.query[:, :, start:stop], call.key[:, :, start:stop]
            for probe in self.vision_probes[layer]:
                if probe.kind == "keys":
                    probe.receive(k[:, :, first:])
                elif probe.of_map is not None:
                    probe.receive(probe.of_map(q, k, call.scaling)[:, None])
                elif probe.kind == "cls":
                    weights = torch.softmax(row_scores(q[:, :, :1], k, call.scaling), dim=-1)
                    probe.receive(weights[:, :, 0, 1:])
                elif probe.kind == "cls_wide":
                    query, keys = (heads.transpose(1, 2).flatten(2)[:, None] for heads in (q[:, :, :1], k))
                    weights = torch.softmax(row_scores(query, keys, query.shape[-1] ** -0.5), dim=-1)
                    probe.receive(weights[:, :, 0, 1:])
                else:
                    rows = q[:, :, first:] if probe.kind == "received" else q
                    probe.receive(received_attention(rows, k, call.scaling)[:, :, first:])
        return call.run_base()


def _refuse_windows(family: Family, layers: Sequence[int]) -> None:
    """Layers whose cache drops or compresses keys: masks of the whole sequence do not fit what they attend to."""
    kept = getattr(DynamicCache(config=family.text_config), "layers", ())
    for layer in layers:
        kind = type(kept[layer]).__name__ if layer < len(kept) else "DynamicLayer"
        if kind != "DynamicLayer":
            raise ModelError(
                f"decoder layer {layer} of {type(family.text_model).__name__} keeps its keys in a {kind}, which does "
                "not hold the whole sequence; attention can be edited and read in layers of full attention only"
            )


def _weights_only(receive: Callable[[Tensor, Tensor], None] | None) -> Callable[[Tensor, Tensor, Tensor, Edit], None]:
    assert receive is not None
    return lambda weights, real, rows, edit: receive(weights, real)


def _segments(boundaries: Tensor | None, length: int) -> list[tuple[int, int]]:
    """Spans of packed sequences in a variable-length flash call; the whole call otherwise."""
    if boundaries is None:
        return [(0, length)]
    cuts = boundaries.tolist()
    return list(pairwise(cuts))


def _bind_hook(function: Callable[..., None], layer: int) -> Callable[..., None]:
    return lambda module, args, kwargs: function(layer, args, kwargs)
