"""
What a method that looks may ask of the plain decoder: derivatives, attention with its graph, whole matrices.

No other method of the model acts in any of this. It is read below ``generate``, in forwards of the language model whose
attention calls somebody answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmmhooks.engines.answering import Asker, started
from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.rows import apply_weights, row_scores
from lmmhooks.geometry import Geometry, geometry_of
from lmmhooks.vision import PIXELS, VisionInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks.engines.looking import LookingEngine

__all__ = ["TEXT_INPUTS", "PlainDecoder"]

#: Inputs that are about the text of a prompt; the others are about its images.
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


class PlainDecoder(Asker):
    """Base of `lmmhooks.engines.looking.Looker`; see `lmmhooks.methods.refinement.base.Look`."""

    engine: LookingEngine
    family: Any
    image: Image
    _geometry: Geometry | None

    def _inputs(self, images: Sequence[Image], prompt: str | Sequence[str]) -> dict[str, Any]:
        raise NotImplementedError

    def _showing(self, images: Sequence[Image], inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        raise NotImplementedError

    def gradient(self, prompt: str, layer: int) -> tuple[Tensor, Tensor]:
        kwargs, cache = self._read(prompt)
        # The last position is read again, with its graph.
        cache.crop(-1)
        step = {**_without_images(kwargs), "inputs_embeds": kwargs["inputs_embeds"][:, -1:], "past_key_values": cache}
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                step[name] = kwargs[name][..., -1:]
        leaf: list[Tensor] = []

        def attend(call: AttentionCall) -> AttentionResult:
            scores = row_scores(call.query, call.key, call.scaling, call.kwargs.get("softcap"))
            weights = scores.softmax(dim=-1).detach().requires_grad_()
            leaf.append(weights)
            return apply_weights(weights, call.value).transpose(1, 2).to(call.query.dtype).contiguous(), None

        # Below the layer nothing asks for gradients: the graph is one token from there on.
        with torch.enable_grad(), self.engine.runtime.silent({layer: attend}):
            hidden = self.family.text_model(**{**step, "use_cache": True}).last_hidden_state
            chance = self.family.token_logits(hidden[0, -1]).log_softmax(dim=-1).max()
            [gradient] = torch.autograd.grad(chance, leaf)
        positions = self._span().positions.to(gradient.device)
        return leaf[0].detach()[0, :, 0, positions].cpu(), gradient[0, :, 0, positions].cpu()

    def pixel_gradient(self, prompt: str) -> list[Tensor]:
        inputs = self._inputs([self.image], prompt)
        name = next(name for name in (PIXELS["image"], *inputs) if name in inputs and inputs[name].is_floating_point())
        pixels = inputs[name].detach().clone().requires_grad_()
        once, runtime = self.engine.once, self.engine.runtime
        with torch.enable_grad():
            kwargs = once.given({**inputs, name: pixels})
            self._see()
            with runtime.silent({}):
                hidden = self.family.text_model(**{**kwargs, "use_cache": False}).last_hidden_state
            chance = self.family.token_logits(hidden[0, -1]).log_softmax(dim=-1).max()
            [gradient] = torch.autograd.grad(chance, pixels)
        given = {key: value for key, value in inputs.items() if key not in TEXT_INPUTS}
        # Only the arguments of the call are looked at.
        features = BaseModelOutputWithPooling(pooler_output=[torch.empty(len(self._span()), 0)])
        vision = VisionInputs("image", {**given, name: gradient.float().cpu()}, features)
        return [part for image in self.family.unpack_pixels(vision) for part in image]

    def steer(self, prompt: str, layers: Sequence[int], offset: Tensor) -> Tensor:
        kwargs = self._given(prompt)
        span = self._span()
        embeds = kwargs["inputs_embeds"].clone()
        places = span.positions.to(embeds.device)
        embeds = embeds.index_add(1, places, offset.to(embeds)[None])
        found: dict[int, Tensor] = {}
        first = span.stop

        def attend(layer: int, call: AttentionCall) -> AttentionResult:
            scores = row_scores(call.query[:, :, first:], call.key, call.scaling, call.kwargs.get("softcap"))
            rows = torch.arange(first, call.query.shape[2], device=scores.device)
            later = torch.arange(call.key.shape[2], device=scores.device) > rows[:, None]
            found[layer] = scores.masked_fill(later, -torch.inf).softmax(dim=-1)[0][..., places]
            if layer == max(layers):
                raise _Enough
            return call.run_base()

        step = {**kwargs, "inputs_embeds": embeds, "past_key_values": None, "use_cache": False}
        listeners = {layer: partial(attend, layer) for layer in layers}
        with torch.enable_grad(), self.engine.runtime.silent(listeners), suppress(_Enough):
            self.family.text_model(**step)
        return torch.stack([found[layer] for layer in sorted(found)])

    def matrices(self, prompt: str, reply: Sequence[int], fold: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        kwargs = self._given(prompt, reply)
        length = kwargs["inputs_embeds"].shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=kwargs["inputs_embeds"].device).triu(1)
        found: dict[int, Tensor] = {}

        def attend(layer: int, call: AttentionCall) -> AttentionResult:
            groups = call.query.shape[1] // call.key.shape[1]
            total = torch.zeros(length, length, device=call.query.device)
            # One head at a time: all of them would be the largest tensor of the model.
            for head in range(call.query.shape[1]):
                query, key = call.query[:, [head]], call.key[:, [head // groups]]
                scores = row_scores(query, key, call.scaling, call.kwargs.get("softcap"))
                total += fold(scores.masked_fill(later, -torch.inf).softmax(dim=-1)[0, 0])
            found[layer] = (total / call.query.shape[1]).cpu()
            if layer == len(self.family.layers) - 1:
                raise _Enough
            return call.run_base()

        step = {**kwargs, "past_key_values": None, "use_cache": False}
        listeners = {layer: partial(attend, layer) for layer in range(self.family.num_layers)}
        with torch.no_grad(), self.engine.runtime.silent(listeners), suppress(_Enough):
            self.family.text_model(**step)
        return torch.stack([found[layer] for layer in sorted(found)]), self._span().positions.cpu()

    def _given(self, prompt: str, reply: Sequence[int] = ()) -> dict[str, Any]:
        """What the language model would be given to read a prompt about the image, and the beginning of its answer."""
        inputs = self._inputs([self.image], prompt)
        for token in reply:
            inputs = started(inputs, [token])
        return self._given_inputs(inputs)

    def _given_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        with self._showing([self.image], inputs), torch.no_grad():
            kwargs = self.engine.once.given(inputs)
        self._see()
        return kwargs

    def _read(self, prompt: str) -> tuple[dict[str, Any], DynamicCache]:
        """The same, with the cache that the language model leaves once it read the prompt; no method acts in it."""
        inputs, cache = self._inputs([self.image], prompt), DynamicCache(config=self.family.text_config)
        kwargs = self._given_inputs(inputs)
        with torch.no_grad():
            if self.engine.once.shares:
                with self._showing([self.image], inputs):
                    self.family.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            else:
                with self.engine.runtime.silent({}):
                    self.family.text_model(**{**kwargs, "past_key_values": cache, "use_cache": True})
        return kwargs, cache

    def _span(self) -> Any:
        return self.engine.runtime.last_state.layout.spans_of(0)[0]

    def _see(self) -> None:
        """Note where the image's tokens lie, while the newest prompt is one about it."""
        if self._geometry is None:
            self._geometry = geometry_of(self.family, self._span(), self.image.size, self.processor)


class _Enough(Exception):
    """What was wanted of a forward has been read."""


def _without_images(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the language model for positions that are text."""
    return {
        name: value for name, value in kwargs.items() if name not in ("visual_pos_masks", "deepstack_visual_embeds")
    }
