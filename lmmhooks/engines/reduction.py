"""
Runs reduction methods: visual tokens leave before the decoder or before decoder layer k, and nothing else notices.

A cut gathers the hidden states in a forward pre-hook and begins a new stage of the prompt. From then on every layer is
handed positions and a mask of its own stage, so its cache is only as long as the sequence it saw; before the final norm
the full length is restored, so that logits, labels and ``logits_to_keep`` mean what they mean without a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.cutting import Selection, select_tokens
from lmmhooks.engines.limits import refuse_caches, refuse_layers, refuse_rewound
from lmmhooks.engines.peeking import peek
from lmmhooks.engines.probes import DecoderProbe, VisionProbe
from lmmhooks.engines.probing import Readings
from lmmhooks.engines.sequences import (
    gather_deepstack,
    gather_last,
    gather_rotary,
    put_back,
    renumbered,
)
from lmmhooks.engines.state import PromptState, Stage
from lmmhooks.errors import ModelError
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.reduction.base import Cut, ReductionMethod

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["ReductionEngine"]


class ReductionEngine:
    """
    Attaches the cuts of all reducers of a model.

    Attributes
    ----------
    decoder_probes, vision_probes
        What the attention engine must read for the methods.

    Raises
    ------
    ModelError
        On construction, for decoders whose layers do not all keep every token (sliding windows).
    """

    def __init__(self, runtime: Runtime, methods: Sequence[ReductionMethod]) -> None:
        self.runtime = runtime
        family = runtime.family
        self.cuts: dict[int, tuple[ReductionMethod, Cut]] = {
            cut.layer: (method, cut)
            for method in methods
            for cut in method.cuts(family)
            if cut.layer < family.num_layers
        }
        probes = [(method, probe) for method in methods for probe in method.probes(family)]
        self.peeked: dict[int, list[Probe]] = {}
        """Attention of a layer that decides what enters that very layer, by layer."""
        for method, probe in probes:
            if probe.ahead and self.cuts.get(probe.layer, (None,))[0] is method:
                self.peeked.setdefault(probe.layer, []).append(probe)
        peeked = {probe.name for found in self.peeked.values() for probe in found}
        self.readings = Readings(runtime, [probe for _, probe in probes], peeked)
        self.decoder_probes: list[DecoderProbe] = self.readings.decoder_probes
        self.vision_probes: list[VisionProbe] = self.readings.vision_probes
        if self.cuts:
            refuse_layers(family, "reduction")
        renumbers = any(layer > 0 and method.repacks(family) for layer, (method, _) in self.cuts.items())
        if renumbers and not hasattr(family.text_model, "rotary_emb"):
            raise ModelError(
                f"{type(family.text_model).__name__} has no rotary_emb to number positions anew with; "
                "use positions='keep'"
            )
        # The model adds these features to sequences of full length; once one is cut between two additions, we do it.
        self._adds_deepstack = any(0 < layer < family.deepstack_layers for layer in self.cuts)

    def attach(self, attachments: Attachments) -> None:
        """Hook the language model, every layer from the first cut on, and the final norm."""
        family = self.runtime.family
        if not self.cuts:
            return
        attachments.pre_hook(family.text_model, self._enter_text, "language model (reduction)")
        later = [layer for layer in self.cuts if layer > 0]
        for layer in range(min(later), family.num_layers) if later else ():
            attachments.pre_hook(
                family.layers[layer], partial(self._enter_layer, layer), f"input of decoder layer {layer} (cut)"
            )
        for layer in range(family.deepstack_layers) if self._adds_deepstack else ():
            attachments.hook(
                family.layers[layer], partial(self._add_deepstack, layer), f"deepstack of decoder layer {layer}"
            )
        attachments.pre_hook(family.norm, self._restore, "final norm (restores the full length)")
        self.readings.attach(attachments)

    # -- before the decoder -------------------------------------------------------------------------------------------

    def _enter_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.runtime.current
        if state is None:
            return None
        if not state.is_prefill:
            return args, self._continue_text(state, kwargs)
        refuse_caches(kwargs, "reduction")
        kwargs = dict(kwargs)
        if 0 in self.cuts:
            self._cut_text(state, kwargs)
        if self._adds_deepstack and kwargs.get("visual_pos_masks") is not None:
            memory = state.memory(self)
            memory["deepstack"] = kwargs.pop("visual_pos_masks"), kwargs.pop("deepstack_visual_embeds")
        return args, kwargs

    def _cut_text(self, state: PromptState, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs["inputs_embeds"]
        cut = self._select(0, state, embeddings)
        if cut is None:
            return
        stage = self._begin_stage(0, state, cut)
        state.stages[0] = stage
        kwargs["attention_mask"] = stage.mask
        if stage.mask is None and kwargs.get("past_key_values") is None:
            # Without a mask and a cache, gaps between positions would be read as several packed sequences.
            kwargs["attention_mask"] = torch.ones_like(cut.index)
        if cut.hide:
            return
        self._leave(state, embeddings, cut)
        kwargs["inputs_embeds"] = cut.apply(embeddings)
        positions = kwargs.get("position_ids")
        if self.cuts[0][0].repacks(self.runtime.family):
            positions = renumbered(cut.index)
        else:
            if positions is None:
                positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
            positions = gather_last(positions, cut.index)
        kwargs["position_ids"] = positions
        if kwargs.get("visual_pos_masks") is not None:
            kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = gather_deepstack(
                kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"], cut.index
            )

    def _continue_text(self, state: PromptState, kwargs: dict[str, Any]) -> dict[str, Any]:
        positions = kwargs.get("position_ids")
        if state.num_queries > 1 and positions is not None:
            refuse_rewound(state, positions, "a reduction before the decoder")
        first = state.stages[0]
        if first.index is None:
            return kwargs
        kwargs = {**kwargs, "attention_mask": first.mask}
        if first.shift is not None and positions is not None:
            kwargs["position_ids"] = positions - first.shift.to(positions.device)[:, None]
        return kwargs

    # -- before a decoder layer ---------------------------------------------------------------------------------------

    def _enter_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut on the input of this layer if it is one's turn, and hand it the inputs of its stage."""
        state = self.runtime.current
        if state is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if state.is_prefill and layer in self.cuts and layer > 0:
            hidden = self._cut_layer(layer, state, hidden, kwargs)
        stage = state.stage_at(layer)
        if stage is state.stages[0]:
            return None
        if "inputs" not in stage.scratch:
            stage.scratch["inputs"] = self._continued_inputs(state.stages[0], stage, hidden, kwargs)
        kwargs = {**kwargs, **stage.scratch["inputs"]}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _cut_layer(self, layer: int, state: PromptState, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        previous = state.stages[-1]
        inputs = previous.scratch.get("inputs", kwargs)
        for probe in self.peeked.get(layer, ()):
            rest = {**kwargs, **inputs}
            peek(self.runtime, layer, hidden, rest, probe.rows, partial(self.readings.hear_rows, probe))
        cut = self._select(layer, state, hidden)
        if cut is None:
            return hidden
        family = self.runtime.family
        repacks = self.cuts[layer][0].repacks(family)
        stage = self._begin_stage(layer, state, cut)
        state.stages.append(stage)
        positions, angles = inputs.get("position_ids"), inputs.get("position_embeddings")
        if not cut.hide:
            self._leave(state, hidden, cut)
            hidden = cut.apply(hidden)
            if repacks:
                positions = renumbered(cut.index)
                angles = family.text_model.rotary_emb(hidden, positions)
            else:
                positions = None if positions is None else gather_last(positions, cut.index)
                angles = None if angles is None else tuple(gather_rotary(part, cut.index) for part in angles)
            self._cut_deepstack(state, cut)
        stage.scratch["inputs"] = {
            "attention_mask": self._mask(stage, hidden, kwargs),
            "position_ids": positions,
            "position_embeddings": angles,
        }
        return hidden

    def _continued_inputs(self, first: Stage, stage: Stage, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of a layer after a cut, for tokens that continue the prompt."""
        inputs = {"attention_mask": self._mask(stage, hidden, kwargs)}
        positions = kwargs.get("position_ids")
        before = first.shift
        if stage.shift is not None and stage.shift is not before and positions is not None:
            # The language model was given positions of the first stage.
            shift = stage.shift if before is None else stage.shift - before
            inputs["position_ids"] = positions - shift.to(positions.device)[:, None]
            inputs["position_embeddings"] = self.runtime.family.text_model.rotary_emb(hidden, inputs["position_ids"])
        return inputs

    def _mask(self, stage: Stage, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        # The model's own mask is as long as its first layer's cache; this layer's cache may be shorter.
        return create_causal_mask(
            config=self.runtime.family.text_model.config,
            inputs_embeds=hidden,
            attention_mask=stage.mask,
            past_key_values=kwargs.get("past_key_values"),
            position_ids=None,
            layer_idx=stage.layer,
        )

    # -- what both have in common -------------------------------------------------------------------------------------

    def _select(self, layer: int, state: PromptState, hidden: Tensor) -> Selection | None:
        method, cut = self.cuts[layer]
        initial = state.memory(self).setdefault(method.id, {})
        return select_tokens(method, cut, hidden, state, initial, self.readings)

    def _begin_stage(self, layer: int, state: PromptState, cut: Selection) -> Stage:
        previous = state.stages[-1]
        index = cut.index if previous.index is None else gather_last(previous.index + 1, cut.index) - 1
        kept = (cut.index >= 0).sum(dim=1)
        shift = previous.shift
        if not cut.hide and self.cuts[layer][0].repacks(self.runtime.family) and state.next_position is not None:
            shift = state.next_position.to(kept.device) - kept
        removed = previous.removed
        if not cut.hide:
            removed = state.layout.valid.sum(dim=1).to(kept.device) - kept
        mask = cut.index >= 0 if cut.is_padded else None
        return Stage(layer, previous.layout.gather(cut.host), index, mask, removed, shift)

    def _leave(self, state: PromptState, before: Tensor, cut: Selection) -> None:
        state.memory(self).setdefault("left", []).append((before, cut.inverse))

    def _restore(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self.runtime.current
        if state is None or not state.is_prefill:
            return None
        memory = state.memory(self)
        memory.pop("deepstack", None)
        left = memory.pop("left", ())
        if not left:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        for before, inverse in reversed(left):
            hidden = put_back(before, hidden, inverse)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    # -- deepstack ----------------------------------------------------------------------------------------------------

    def _cut_deepstack(self, state: PromptState, cut: Selection) -> None:
        memory = state.memory(self)
        if "deepstack" in memory:
            mask, features = memory["deepstack"]
            memory["deepstack"] = gather_deepstack(mask, features, cut.index)

    def _add_deepstack(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """The layer's output with its deepstack features added at the visual positions that are left."""
        state = self.runtime.current
        if state is None or "deepstack" not in state.memory(self):
            return None
        mask, features = state.memory(self)["deepstack"]
        if layer >= len(features):
            return None
        mask = mask.to(output.device)
        output = output.clone()
        output[mask] = output[mask] + features[layer].to(output.device, output.dtype)
        return output
