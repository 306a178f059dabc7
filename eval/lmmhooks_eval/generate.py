"""One batch: images and prompts in, texts and costs out, through the model's own ``generate``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from lmmhooks.engines.watching import watched_scores
from lmmhooks.errors import closest
from lmmhooks.metering import TokenClock, kv_cache_bytes, synchronizer
from lmmhooks.prompting import Prompter
from lmmhooks_eval.accounting import MemoryMeter
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.evidence import Evidence, word_tokens
from lmmhooks_eval.task import AnswerWords

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks.engines.answering import AnswerCost

__all__ = ["Answer", "BatchCost", "Generator", "padded_to_square"]


@dataclass(frozen=True)
class Answer:
    """
    What the model said to one document.

    Parameters
    ----------
    text
        Decoded, special tokens removed, stripped.
    tokens
        Generated ids up to and including the end token; None for an answer put together from several generations.
    new_tokens
        How many were generated for it.
    stop_reason
        ``"eos"`` or ``"length"``; ``"assembled"`` for an answer put together.
    prompt_tokens, visual_tokens
        Unpadded prompt length, and how many of its tokens are visual; all prompts of an answer put together.
    cost
        Of an answer put together; None for any other.
    margin, gaps
        See `lmmhooks_eval.evidence`; None where they are not known.
    """

    text: str
    tokens: tuple[int, ...] | None
    new_tokens: int
    stop_reason: str
    prompt_tokens: int
    visual_tokens: int
    cost: AnswerCost | None = None
    margin: float | None = None
    gaps: list[float] | None = None


@dataclass(frozen=True)
class BatchCost:
    """
    Cost of one batch; times in milliseconds.

    Parameters
    ----------
    size, steps
        Rows, and tokens generated for the longest of them; one more than there were decode steps.
    preprocess_ms, prefill_ms, decode_ms
        Processor and transfer; first token; the others (None if there was one). Added up over all generations where
        answers are put together from several.
    memory_mib
        See `MemoryMeter`.
    kv_bytes
        Per layer, all rows, at the end of generation; None without a cache.
    """

    size: int
    steps: int
    preprocess_ms: float
    prefill_ms: float
    decode_ms: float | None
    memory_mib: float | None
    kv_bytes: list[int] | None


class Generator:
    """
    Asks a loaded model.

    Parameters
    ----------
    model, processor
        As loaded; neither is changed.
    settings
        Image processor settings that replace its own.
    pad_to_square
        Pad every image to a square before the image processor sees it, see `padded_to_square`.
    system
        System message put before questions that are rendered here; prompts come with theirs.

    Raises
    ------
    RecipeError
        If the image processor knows no such setting, or has no mean colour to pad with.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: Mapping[str, Any] | None = None,
        *,
        pad_to_square: bool = False,
        system: str | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.settings = dict(settings or {})
        colour = _mean_colour(processor.image_processor) if pad_to_square else None
        show = None if colour is None else partial(padded_to_square, colour=colour)
        self.prompter = Prompter(processor, system, self.settings, show)
        known = getattr(getattr(processor.image_processor, "valid_kwargs", None), "__annotations__", None)
        for key in self.settings:
            if known is not None and key not in known:
                raise RecipeError(
                    f"the image processor of this model has no setting {key!r}{closest(key, known)}; "
                    f"it has {', '.join(sorted(known))}"
                )
        self._words: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._eos = _as_set(model.generation_config.eos_token_id)
        pad = model.generation_config.pad_token_id
        self._pad = processor.tokenizer.pad_token_id if pad is None else pad
        self._image_token = getattr(model.config, "image_token_id", None)

    def ask(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Any]],
        generation: Mapping[str, Any],
        seed: int,
        words: AnswerWords | None = None,
    ) -> tuple[list[Answer], BatchCost]:
        """
        Answer one batch.

        Parameters
        ----------
        prompts
            Rendered prompts.
        images
            The images of each, in the order of their placeholders.
        generation
            Arguments of ``generate``.
        seed
            For whatever is random in sampling or in a method; the state of the global generators is put back
            afterwards.
        words
            The words between which the first token decides, for answers' `Answer.margin`.
        """
        device = self.model.device
        started = time.perf_counter()
        inputs = self.inputs(prompts, images)
        evidence = Evidence(len(prompts), None if words is None else self._tokens_of(words))
        synchronizer(device)()
        preprocess_ms = 1000 * (time.perf_counter() - started)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            memory, clock = MemoryMeter(device), TokenClock(device)
            with watched_scores(self.model, evidence):
                output = self.model.generate(
                    **inputs,
                    **self._arguments(generation),
                    stopping_criteria=StoppingCriteriaList([clock]),
                    return_dict_in_generate=True,
                )
            clock.finish()
        cost = BatchCost(
            size=len(prompts),
            steps=clock.steps,
            preprocess_ms=preprocess_ms,
            prefill_ms=clock.prefill_ms,
            decode_ms=clock.decode_ms,
            memory_mib=memory.mib(),
            kv_bytes=kv_cache_bytes(getattr(output, "past_key_values", None)),
        )
        answers = self._read(inputs, output.sequences)
        gaps = evidence.gaps([answer.new_tokens for answer in answers])
        noted = zip(answers, evidence.margins(), gaps, strict=True)
        return [replace(answer, margin=margin, gaps=steps) for answer, margin, steps in noted], cost

    def put_together(
        self,
        patch: Any,
        questions: Sequence[str],
        images: Sequence[Sequence[Any]],
        generation: Mapping[str, Any],
        seeds: Sequence[int],
        regions: Sequence[tuple[float, float, float, float]] | None = None,
    ) -> tuple[list[Answer], BatchCost]:
        """
        Answer a batch, one document after the other, by a patch that makes one answer of several generations.

        Parameters
        ----------
        patch
            An active `lmmhooks.Patch`.
        questions
            As plain text: what is asked in the end is the method's to render, with the same system message, template
            and image settings as every other prompt.
        images, generation
            As in `ask`.
        seeds
            One per document.
        regions
            Where to look in each image, for a method that has to be told; None for the others.
        """
        device, answers = self.model.device, []
        memory = MemoryMeter(device)
        told = [{}] * len(questions) if regions is None else [{"region": region} for region in regions]
        for question, shown, seed, where in zip(questions, images, seeds, told, strict=True):
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                text = patch.answer(
                    list(shown) or None, question, prompter=self.prompter, **where, **self._arguments(generation)
                )
            cost = patch.answer_cost
            counted = (cost.new_tokens, "assembled", cost.prompt_tokens, cost.visual_tokens)
            answers.append(Answer(text, None, *counted, cost))
        costs = [answer.cost for answer in answers if answer.cost is not None]
        decode_steps = sum(cost.steps - cost.passes for cost in costs)
        held = [cost.kv_bytes for cost in costs if cost.kv_bytes is not None]
        return answers, BatchCost(
            size=len(questions),
            steps=1 + decode_steps,
            preprocess_ms=sum(cost.preprocess_ms for cost in costs),
            prefill_ms=sum(cost.prefill_ms for cost in costs),
            decode_ms=sum(cost.decode_ms for cost in costs) if decode_steps else None,
            memory_mib=memory.mib(),
            kv_bytes=[sum(layer) for layer in zip(*held, strict=True)] or None,
        )

    def first_tokens(self, inputs: Any) -> list[str]:
        """The most likely first token of every answer as text; ``inputs`` as `inputs` returns them."""
        arguments = self._arguments({"do_sample": False, "max_new_tokens": 1})
        with torch.inference_mode():
            sequences = self.model.generate(**inputs, **arguments)
        return [answer.text for answer in self._read(inputs, sequences)]

    def first_logits(self, inputs: Any) -> torch.Tensor:
        """Logits of the first token of every answer, ``[B, vocabulary]``; ``inputs`` as `inputs` returns them."""
        output = self._greedy(inputs, 1, output_logits=True, return_dict_in_generate=True)
        logits: torch.Tensor = output.logits[0]
        return logits

    def tokens(self, inputs: Any, number: int) -> torch.Tensor:
        """Ids ``[B, number]`` of the most likely tokens of every answer, past the end of an answer too."""
        sequences: torch.Tensor = self._greedy(inputs, number)
        return sequences[:, -number:]

    def _greedy(self, inputs: Any, number: int, **arguments: Any) -> Any:
        arguments |= {"do_sample": False, "max_new_tokens": number, "min_new_tokens": number}
        with torch.inference_mode():
            return self.model.generate(**inputs, **self._arguments(arguments))

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
        """The processor's tensors of a batch on the model's device, padded on the left."""
        return self.prompter.batch(prompts, images).to(self.model.device, dtype=self.model.dtype)

    def _tokens_of(self, words: AnswerWords) -> tuple[list[int], list[int]]:
        key = words.positive, words.negative
        if key not in self._words:
            self._words[key] = word_tokens(self.processor.tokenizer, words)
        return self._words[key]

    def _arguments(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {"pad_token_id": self._pad, **generation}
        if not arguments.get("do_sample"):
            # Checkpoints ship sampling settings that a greedy run would only be warned about.
            arguments |= {"temperature": None, "top_p": None, "top_k": None}
        return arguments

    def _read(self, inputs: Any, sequences: torch.Tensor) -> list[Answer]:
        prompt_ids, mask = inputs["input_ids"], inputs["attention_mask"]
        answers = []
        for row, sequence in enumerate(sequences):
            tokens = sequence[prompt_ids.shape[1] :].tolist()
            end = next((index for index, token in enumerate(tokens) if token in self._eos), None)
            tokens = tokens if end is None else tokens[: end + 1]
            visual = 0 if self._image_token is None else int((prompt_ids[row] == self._image_token).sum())
            answers.append(
                Answer(
                    text=self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                    tokens=tuple(tokens),
                    new_tokens=len(tokens),
                    stop_reason="length" if end is None else "eos",
                    prompt_tokens=int(mask[row].sum()),
                    visual_tokens=visual,
                )
            )
        return answers


def padded_to_square(image: Image, colour: tuple[int, int, int]) -> Image:
    """
    An RGB image in the middle of a square of one colour, as LLaVA-1.5's own pipeline shows it; a square as it is.

    Where the margins cannot be equal, the one at the top or the left is a pixel narrower.
    """
    width, height = image.size
    if width == height:
        return image
    from PIL import Image as images

    side = max(width, height)
    square = images.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _mean_colour(image_processor: Any) -> tuple[int, int, int]:
    mean = getattr(image_processor, "image_mean", None)
    if mean is None or len(mean) != 3:
        raise RecipeError(
            f"pad_to_square needs the image processor's mean colour, which {type(image_processor).__name__} has not; "
            f"drop pad_to_square"
        )
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def _as_set(token: int | list[int] | None) -> frozenset[int]:
    if token is None:
        return frozenset()
    return frozenset([token] if isinstance(token, int) else token)
