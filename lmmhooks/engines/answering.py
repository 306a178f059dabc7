"""
Runs methods that put an answer together from several generations: ``patch.answer`` goes through them.

``model.generate`` itself answers one prompt once, which is not what such a method does, and is refused while one is on
the model. What the method asks runs through the same ``generate``, under every other method of the model.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from lmmhooks.engines.attach import Attachments
from lmmhooks.errors import PromptError
from lmmhooks.metering import TokenClock, kv_cache_bytes, synchronizer
from lmmhooks.methods.decoding.answering import AnswerMethod, Draw, Reply
from lmmhooks.methods.words import token_texts
from lmmhooks.prompting import Prompter, as_images, decode_new, open_image
from lmmhooks.stats import Stats

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime

__all__ = ["AnswerCost", "AnswerEngine", "Asker", "started"]


@dataclass
class AnswerCost:
    """
    What an answer took, all generations for it together; replies that were remembered cost nothing.

    Attributes
    ----------
    passes
        Generations; each is one batch of replies.
    replies
        Rows of those batches.
    prompt_tokens, visual_tokens
        Read by all rows, padding not counted; the second are among the first.
    new_tokens
        Generated, up to the end token of each reply.
    steps
        Forwards: the longest reply of every pass, added up.
    visual_kept
        Per decoder layer, visual tokens that entered it in all rows; branches of a decoding method not counted.
    prefill_flops
        As in `lmmhooks.stats.Stats`, branches included; None where the theory does not cover the decoder.
    preprocess_ms, prefill_ms, decode_ms
        Processor and transfer; from there to the first token; from it to the last: each added up over the passes.
    kv_bytes
        Per layer, of the pass whose cache was the largest; None without a cache.
    """

    passes: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    visual_kept: list[int] = field(default_factory=list)
    prefill_flops: float | None = 0.0
    preprocess_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    kv_bytes: list[int] | None = None


class AnswerEngine:
    """Attaches one method that answers prompts to a model."""

    def __init__(self, runtime: Runtime, methods: Sequence[AnswerMethod]) -> None:
        self.runtime = runtime
        self.method: AnswerMethod
        [self.method] = methods
        self.memory: dict[Any, Any] = {}
        self.cost = AnswerCost()
        """Of the newest answer."""
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

    def answer(self, prompter: Prompter, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        """
        What `lmmhooks.patch.Patch.answer` returns; what it took is in `cost` afterwards.

        Raises
        ------
        PromptError
            As there.
        """
        self._asking, self.cost = True, AnswerCost()
        try:
            if as_images(image):
                asker = self.asker(prompter, image, prompt, generate_kwargs)
                return self.method.answer(asker, image, prompt, **generate_kwargs)
            # There is nothing to look at in several ways.
            inputs = self.inputs(prompter, image, [prompt])
            out = self.generate(inputs, **generate_kwargs)
            return decode_new(prompter.processor, out.sequences, inputs["input_ids"].shape[1])[0]
        finally:
            self._asking = False

    def asker(self, prompter: Prompter, image: Any, prompt: str, generate_kwargs: dict[str, Any]) -> Asker:
        """What the method is given to run the model; takes out of ``generate_kwargs`` what is not for generation."""
        return Asker(self, prompter)

    def inputs(
        self,
        prompter: Prompter,
        image: Any,
        prompts: Sequence[str | Sequence[str]],
        turns: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Model inputs of several questions about one image (or several, or none); see `Prompter.inputs`."""
        started = time.perf_counter()
        weight = next(self.runtime.family.model.parameters())
        images = [as_images(image)] * len(prompts)
        inputs = prompter.inputs(images, prompts, weight.device, weight.dtype, turns=turns)
        synchronizer(weight.device)()
        self.cost.preprocess_ms += 1000 * (time.perf_counter() - started)
        return inputs

    def generate(self, inputs: dict[str, Any], **arguments: Any) -> Any:
        """One pass: the dictionary that ``model.generate`` returns, its cost added up."""
        model = self.runtime.family.model
        clock = TokenClock(next(model.parameters()).device)
        criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), clock])
        arguments |= {"stopping_criteria": criteria, "return_dict_in_generate": True}
        with torch.inference_mode():
            out = model.generate(**inputs, **arguments)
        clock.finish()
        self._count(inputs, out, clock)
        return out

    def ended(self, tokens: Sequence[int]) -> Sequence[int]:
        """Generated ids up to and including the end token."""
        ends = self.runtime.family.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        return tokens[: stop + 1]

    def _count(self, inputs: dict[str, Any], out: Any, clock: TokenClock) -> None:
        cost, family, state = self.cost, self.runtime.family, self.runtime.last_state
        ids = inputs["input_ids"]
        visual = [token for token in (family.image_token_id, family.video_token_id) if token is not None]
        cost.passes += 1
        cost.replies += len(ids)
        cost.prompt_tokens += int(inputs["attention_mask"].sum())
        cost.visual_tokens += int(torch.isin(ids, torch.tensor(visual, device=ids.device)).sum())
        cost.new_tokens += sum(len(self.ended(row)) for row in out.sequences[:, ids.shape[1] :].tolist())
        cost.steps += clock.steps
        cost.prefill_ms += clock.prefill_ms
        cost.decode_ms += clock.decode_ms or 0.0
        held = kv_cache_bytes(getattr(out, "past_key_values", None))
        cost.kv_bytes = max(cost.kv_bytes, held, key=lambda layers: sum(layers or ()))
        try:
            stats = Stats.of(family, state)
        except ValueError:  # the theory does not cover this decoder
            cost.prefill_flops, cost.visual_kept = None, []
            return
        if cost.prefill_flops is not None:
            cost.prefill_flops += stats.prefill_flops
        # Beams of a prompt lie side by side, branches behind all of them.
        beams = len(stats.layers[0].visual_kept) // state.blocks // len(ids)
        kept = [sum(layer.visual_kept[row * beams] for row in range(len(ids))) for layer in stats.layers]
        cost.visual_kept = [a + b for a, b in zip(cost.visual_kept or [0] * len(kept), kept, strict=True)]


class Asker:
    """Runs the model for a method; see `lmmhooks.methods.decoding.answering.Ask`."""

    def __init__(self, engine: AnswerEngine, prompter: Prompter) -> None:
        self.engine = engine
        self.prompter = prompter
        self.processor = prompter.processor
        self.memory = engine.memory
        self.unspeakable = engine.runtime.family.visual_ids

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
        inputs = self.engine.inputs(self.prompter, image, prompts)
        if starts is not None:
            inputs = started(inputs, starts)
        processors = LogitsProcessorList(generate_kwargs.pop("logits_processor", None) or [])
        # What is said may stand in a prompt again, in which these would stand for images.
        device = inputs["input_ids"].device
        processors.append(SuppressTokensLogitsProcessor(list(self.unspeakable), device=str(device)))
        if draw is not None and draw.temperature:
            seeds = self._seeds(image, prompts, starts, draw.seed)
            length = int(inputs["input_ids"].shape[1])
            processors.append(_OwnNumbers(draw, seeds, length, max_new_tokens))
        arguments = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **generate_kwargs}
        arguments |= {"max_new_tokens": max_new_tokens, "logits_processor": processors, "output_logits": True}
        out = self.engine.generate(inputs, **arguments)
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
        tokens = tuple(self.engine.ended(tokens))
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
