"""
Runs methods that look at an image before they answer: passes, attention and gradients read in them, what they share.

All passes go through the model's own ``generate``, under every other method of the model. Where there is none, passes
share what they have in common (see `lmmhooks.engines.once`); beside other methods, whose effect may depend on the whole
prompt, every pass reads everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lmmhooks.cost import DecoderShape, dense_counts, prefill_macs
from lmmhooks.engines.answering import AnswerEngine, Asker, started
from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.backend import AttentionCall, AttentionResult
from lmmhooks.engines.editing import Edit
from lmmhooks.engines.once import Picture, ReadOnce
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.engines.rows import apply_weights, row_scores
from lmmhooks.errors import PromptError
from lmmhooks.geometry import Geometry, geometry_of
from lmmhooks.metering import TokenClock
from lmmhooks.methods.decoding.answering import Reply
from lmmhooks.methods.refinement.base import RefinementMethod, Seen
from lmmhooks.placing import image_processor_of
from lmmhooks.prompting import Prompter, as_images
from lmmhooks.vision import PIXELS, VisionInputs

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["LookingEngine"]

#: One token after the other, the likeliest each time, whatever the model's own settings are.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
#: Inputs that are about the text of a prompt; the others are about its images.
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


class LookingEngine(AnswerEngine):
    """Attaches one method of kind refinement to a model."""

    method: RefinementMethod

    def __init__(self, runtime: Runtime, methods: Sequence[RefinementMethod]) -> None:
        super().__init__(runtime, methods)
        # Whoever reads or edits what a forward reads, or makes rows of its own, is to see whole prompts.
        self.once = ReadOnce(runtime, shares=len(runtime.methods()) == 1 and not runtime.probes)
        self.layers = self.method.layers(runtime.family)
        self.looked_at: list[Image] = []
        """Pictures that the newest answer is about, in order."""
        self.rows: dict[int, list[Tensor]] | None = None
        """Attention that is being read, by layer and step; None while nobody listens."""
        self._known: Any = None
        """Image and weights that what was kept is about."""

    @property
    def decoder_probes(self) -> list[DecoderProbe]:
        """For the attention engine."""
        return [
            DecoderProbe(layer, "last", hears=partial(self._hear, layer), on_decode=True, wanted=self._listens)
            for layer in self.layers
        ]

    @property
    def listened(self) -> tuple[int, ...]:
        """Layers whose attention is computed anew in passes that no prompt state follows."""
        return self.method.gradient_layers(self.runtime.family)

    def attach(self, attachments: Attachments) -> None:
        super().attach(attachments)
        self.once.attach(attachments)

    def asker(self, prompter: Prompter, image: Any, prompt: str, generate_kwargs: dict[str, Any]) -> Looker:
        images = as_images(image)
        if len(images) != 1:
            raise PromptError(f"{self.method.id} looks at one image, and was given {len(images)}; ask about each alone")
        region = generate_kwargs.pop("region", None)
        looker = Looker(self, prompter, prompter.shown(images[0]), prompt, region)
        known = looker.digest(looker.image), _weights(self.runtime.family.model)
        if known != self._known:
            self._known = known
            self.once.forget()
            self.memory.clear()
        return looker

    def _count(self, inputs: dict[str, Any], out: Any, clock: TokenClock) -> None:
        super()._count(inputs, out, clock)
        # What an earlier pass had read was not read again.
        text, visual = self.once.shared
        cost, family = self.cost, self.runtime.family
        cost.prompt_tokens -= text + visual
        cost.visual_tokens -= visual
        cost.visual_kept = [kept - visual for kept in cost.visual_kept]
        if cost.prefill_flops is not None and text + visual:
            shape = DecoderShape.from_config(family.model.config)
            cost.prefill_flops -= 2 * prefill_macs(shape, dense_counts(text, [visual] * shape.layers))

    def answer(self, prompter: Prompter, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        if not as_images(image) and generate_kwargs.pop("region", None) is not None:
            raise PromptError("a region was given without an image that it could be a part of; leave region out")
        return super().answer(prompter, image, prompt, **generate_kwargs)

    def _listens(self) -> bool:
        return self.rows is not None and not self.runtime.aside

    def _hear(self, layer: int, weights: Tensor, members: Tensor, rows: Tensor, edit: Edit) -> None:
        assert self.rows is not None, "somebody listens"
        [span] = edit.state.layout.spans_of(0)
        row, index = weights[0, :, -1], edit.stage.index
        if index is None:
            seen = row[:, span.positions.to(row.device)]
        else:
            # Some tokens are gone; what is left stands elsewhere. Generated tokens lie behind the prompt.
            known = index[0].to(row.device)
            full = row.new_zeros(len(row), edit.state.layout.length)
            full.index_add_(1, known.clamp(min=0), row[:, : len(known)] * (known >= 0))
            seen = full[:, span.positions.to(row.device)]
        self.rows[layer].append(seen.float().cpu())


class Looker(Asker):
    """One image in front of the model; see `lmmhooks.methods.refinement.base.Look`."""

    engine: LookingEngine

    def __init__(self, engine: LookingEngine, prompter: Prompter, image: Image, prompt: str, region: Any) -> None:
        super().__init__(engine, prompter)
        self.image = image
        self.prompt = prompt
        self.region = _checked(region, image.size)
        self.family = engine.runtime.family
        self._geometry: Geometry | None = None

    @property
    def geometry(self) -> Geometry:
        if self._geometry is None:
            self._given(self.prompt)
        assert self._geometry is not None, "the newest prompt is about this image"
        return self._geometry

    def at(self, image: Image) -> Looker:
        return Looker(self.engine, self.prompter, image, self.prompt, None)

    @property
    def mean_color(self) -> tuple[int, int, int]:
        mean = getattr(image_processor_of(self.processor, "image"), "image_mean", None) or (0.5, 0.5, 0.5)
        red, green, blue = (int(value * 255) for value in mean)
        return red, green, blue

    def token(self, word: str) -> int:
        ids = self.processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise PromptError(f"{word!r} is {len(ids)} tokens of this model; give a word that is one, such as ' yes'")
        return int(ids[0])

    # -- passes -------------------------------------------------------------------------------------------------------

    def watch(self, prompt: str, *, max_new_tokens: int) -> Seen:
        rows: dict[int, list[Tensor]] = {layer: [] for layer in self.engine.layers}
        self.engine.rows = rows
        try:
            reply = self._generate(prompt, [self.image], {**GREEDY, "max_new_tokens": max_new_tokens})
        finally:
            self.engine.rows = None
        # [T, L, H, n]: what the last token pays is read only if another is predicted from it.
        steps = torch.stack([torch.stack(layer[: len(reply.tokens)]) for layer in rows.values()], dim=1)
        self._see()
        # Beside branches, rows may be padded.
        state = self.engine.runtime.last_state
        # Beside branches, rows may be padded on the left.
        return Seen(reply, steps, int(state.layout.valid[0].sum()))

    def score(self, prompt: str | Sequence[str], images: Sequence[Image] | None = None) -> Tensor:
        shown = [self.image] if images is None else images
        reply = self._generate(prompt, shown, {**GREEDY, "max_new_tokens": 1})
        return reply.logits[0]

    def tell(
        self,
        prompt: str | Sequence[str],
        images: Sequence[Image] | None = None,
        *,
        offset: Tensor | None = None,
        turns: Sequence[tuple[str, str]] = (),
        images_kwargs: Mapping[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> Reply:
        shown = [self.image] if images is None else list(images)
        self.engine.looked_at = shown
        return self._generate(prompt, shown, generate_kwargs, offset, turns, images_kwargs)

    def _generate(
        self,
        prompt: str | Sequence[str],
        images: Sequence[Image],
        arguments: Mapping[str, Any],
        offset: Tensor | None = None,
        turns: Sequence[tuple[str, str]] = (),
        images_kwargs: Mapping[str, Any] | None = None,
    ) -> Reply:
        inputs = self._inputs(images, prompt, turns, images_kwargs)
        with self._showing(images, inputs, offset, images_kwargs):
            out = self.engine.generate(inputs, **arguments, output_logits=True)
        new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        # Of beams, rows change places: their logits are not those of the sequence that won.
        rows = [step[0] for step in out.logits]
        return self._reply(new, torch.stack(rows).float())

    def _inputs(
        self,
        images: Sequence[Image],
        prompt: str | Sequence[str],
        turns: Sequence[tuple[str, str]] = (),
        images_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        prompter = self.prompter
        if images_kwargs:
            prompter = replace(prompter, settings={**prompter.settings, **images_kwargs})
        return self.engine.inputs(prompter, images, [prompt], turns)

    def _showing(
        self,
        images: Sequence[Image],
        inputs: Mapping[str, Any],
        offset: Tensor | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
    ) -> AbstractContextManager[None]:
        """While a pass about some images runs."""

        def process(image: Image) -> dict[str, Any]:
            alone = inputs if len(images) == 1 else self._inputs([image], self.prompt, (), images_kwargs)
            return {name: value for name, value in alone.items() if name not in TEXT_INPUTS}

        how = repr(sorted((images_kwargs or {}).items())).encode()
        return self.engine.once.showing(
            [
                Picture(self.digest(image) + how, partial(process, image), None if place else offset)
                for place, image in enumerate(images)
            ]
        )

    # -- gradients ----------------------------------------------------------------------------------------------------

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
        with self._showing([self.image], inputs), torch.no_grad():
            kwargs = self.engine.once.given(inputs)
        self._see()
        return kwargs

    def _read(self, prompt: str) -> tuple[dict[str, Any], DynamicCache]:
        """The same, with the cache that the language model leaves once it read the prompt; no method acts in it."""
        kwargs, cache = self._given(prompt), DynamicCache(config=self.family.text_config)
        with torch.no_grad():
            if self.engine.once.shares:
                inputs = self._inputs([self.image], prompt)
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


def _weights(model: Any) -> list[tuple[Any, ...]]:
    """Differs once weights moved or changed: what was read with the old ones is of no use."""
    return [(p.data_ptr(), p.dtype, p.is_inference() or p._version) for p in model.parameters()]


class _Enough(Exception):
    """What was wanted of a forward has been read."""


def _without_images(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the language model for positions that are text."""
    return {
        name: value for name, value in kwargs.items() if name not in ("visual_pos_masks", "deepstack_visual_embeds")
    }


def _checked(region: Any, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """A box in pixels of an image, left, top, right, bottom."""
    if region is None:
        return None
    box = tuple(float(value) for value in region)
    inside = len(box) == 4 and 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]
    if not inside:
        raise PromptError(
            f"region={tuple(region)!r} is no part of the image of {size[0]} x {size[1]} pixels; give left, top, right, "
            "bottom in pixels"
        )
    return box  # type: ignore[return-value] # four numbers
