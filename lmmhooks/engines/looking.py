"""
Runs methods that look at an image before they answer: passes, attention and gradients read in them, what they share.

All passes go through the model's own ``generate``, under every other method of the model. Where there is none, passes
share what they have in common (see `lmmhooks.engines.once`); beside other methods, whose effect may depend on the whole
prompt, every pass reads everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from lmmhooks.cost import DecoderShape, dense_counts, prefill_macs
from lmmhooks.engines.answering import AnswerEngine
from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.editing import Edit
from lmmhooks.engines.once import Picture, ReadOnce
from lmmhooks.engines.plain_decoder import TEXT_INPUTS, PlainDecoder
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.errors import PromptError
from lmmhooks.geometry import Geometry
from lmmhooks.metering import TokenClock
from lmmhooks.methods.decoding.answering import Reply
from lmmhooks.methods.refinement.base import RefinementMethod, Seen
from lmmhooks.placing import image_processor_of
from lmmhooks.prompting import Prompter, as_images

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["LookingEngine"]

#: One token after the other, the likeliest each time, whatever the model's own settings are.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


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


class Looker(PlainDecoder):
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


def _weights(model: Any) -> list[tuple[Any, ...]]:
    """Differs once weights moved or changed: what was read with the old ones is of no use."""
    return [(p.data_ptr(), p.dtype, p.is_inference() or p._version) for p in model.parameters()]


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
