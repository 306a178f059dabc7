"""
Runs methods that put an answer together from several generations: ``patch.answer`` goes through them.

``model.generate`` itself answers one prompt once, which is not what such a method does, and is refused while one is on
the model. What the method asks runs through the same ``generate``, under every other method of the model.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lmmhooks.engines.attach import Attachments
from lmmhooks.errors import PromptError
from lmmhooks.methods.decoding.answering import AnswerMethod, Draw, Reply
from lmmhooks.methods.words import token_texts
from lmmhooks.prompting import answer, as_images, build_batch, open_image

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["AnswerEngine", "Asker", "started"]


class AnswerEngine:
    """Attaches one method that answers prompts to a model."""

    def __init__(self, runtime: Runtime, methods: Sequence[AnswerMethod]) -> None:
        self.runtime = runtime
        [self.method] = methods
        self.memory: dict[Any, Any] = {}
        self._asking = False

    def attach(self, attachments: Attachments) -> None:
        """Put a guard in front of ``generate``, and this engine where `lmmhooks.patch.Patch.answer` looks for it."""
        model = self.runtime.family.model
        original = model.generate

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._asking:
                raise PromptError(
                    f"{self.method.id} puts an answer together from several generations, which model.generate does not "
                    "do; call patch.answer(image, prompt), or generate inside patch.disabled()"
                )
            return original(*args, **kwargs)

        attachments.attribute(model, "generate", generate, "model.generate")
        attachments.attribute(self.runtime, "answering", self, "answers of the model")

    def answer(self, processor: Any, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """
        What `lmmhooks.patch.Patch.answer` returns.

        Raises
        ------
        PromptError
            As there.
        """
        self._asking = True
        try:
            if as_images(image):
                asker = self.asker(processor, image, prompt, generate_kwargs)
                return self.method.answer(asker, image, prompt, **generate_kwargs)
            # There is nothing to look at in several ways.
            return answer(self.runtime.family.model, processor, image, prompt, **generate_kwargs)
        finally:
            self._asking = False

    def asker(self, processor: Any, image: Any, prompt: str, generate_kwargs: dict[str, Any]) -> Asker:
        """What the method is given to run the model; takes out of ``generate_kwargs`` what is not for generation."""
        return Asker(self, processor)


class Asker:
    """Runs the model for a method; see `lmmhooks.methods.decoding.answering.Ask`."""

    def __init__(self, engine: AnswerEngine, processor: Any) -> None:
        self.engine = engine
        self.processor = processor
        self.memory = engine.memory

    def __call__(
        self,
        image: Any,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        starts: Sequence[int] | None = None,
        draw: Draw | None = None,
        **generate_kwargs: Any,
    ) -> list[Reply]:
        model = self.engine.runtime.family.model
        weight = next(model.parameters())
        images = as_images(image)
        inputs = build_batch(self.processor, [images] * len(prompts), prompts, weight.device, weight.dtype)
        if starts is not None:
            inputs = started(inputs, starts)
        processors = LogitsProcessorList(generate_kwargs.pop("logits_processor", None) or [])
        if draw is not None and draw.temperature:
            seeds = self._seeds(image, prompts, starts, draw.seed)
            length = int(inputs["input_ids"].shape[1])
            processors.append(_OwnNumbers(draw, seeds, length, max_new_tokens))
        arguments = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **generate_kwargs}
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                **arguments,
                max_new_tokens=max_new_tokens,
                logits_processor=processors,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        logits = torch.stack(out.logits, dim=1).float()
        return [self._reply(tokens, row) for tokens, row in zip(new, logits, strict=True)]

    def digest(self, image: Any) -> bytes:
        name = hashlib.blake2b(digest_size=16)
        for one in as_images(image):
            opened = open_image(one)
            name.update(repr(opened.size).encode())
            name.update(opened.tobytes())
        return name.digest()

    def decode(self, token: int) -> str:
        text: str = self.processor.tokenizer.decode([token], skip_special_tokens=True)
        return text.strip()

    def _reply(self, tokens: Sequence[int], logits: Tensor) -> Reply:
        ends = self.engine.runtime.family.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        tokens = tuple(tokens[: stop + 1])
        return Reply(tokens, tuple(token_texts(self.processor.tokenizer, tokens)), logits[: len(tokens)])

    def _seeds(self, image: Any, prompts: Sequence[str], starts: Sequence[int] | None, seed: int) -> list[int]:
        """A number per reply that depends on what is asked, and on nothing else in the batch."""
        name = self.digest(image)
        seeds = []
        for row, prompt in enumerate(prompts):
            start = None if starts is None else starts[row]
            key = hashlib.blake2b(name, digest_size=8)
            key.update(f"{seed}/{start}/{prompt}".encode())
            seeds.append(int.from_bytes(key.digest(), "little"))
        return seeds


class _OwnNumbers(LogitsProcessor):
    """Draws every row's token by numbers of the row's own, so that a reply does not depend on its neighbours."""

    def __init__(self, draw: Draw, seeds: Sequence[int], length: int, number: int) -> None:
        self.draw = draw
        self.length = length
        rows = [torch.rand(number, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.numbers = torch.stack(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ordered, tokens = (scores.float() / self.draw.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        mass = ordered.cumsum(dim=-1)
        # The smallest set with enough probability: what comes before it has less.
        ordered = ordered.masked_fill(mass - ordered >= self.draw.top_p, 0.0)
        mass = ordered.cumsum(dim=-1)
        now = self.numbers[:, input_ids.shape[1] - self.length].to(mass.device)[:, None] * mass[:, -1:]
        chosen = (mass <= now).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, chosen), 0.0)


def started(inputs: dict[str, Any], starts: Sequence[int]) -> dict[str, Any]:
    """Inputs whose rows go on with one token each."""
    ids = inputs["input_ids"]
    new = torch.tensor(list(starts), dtype=ids.dtype, device=ids.device)[:, None]
    out = {**inputs, "input_ids": torch.cat([ids, new], dim=1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if inputs.get(name) is not None:
            out[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
    return out
