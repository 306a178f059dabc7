"""What a method that looks before it answers costs: whole answers, from image and question to text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from lmmhooks.bench.timing import Spread, interleave, paired_ratio, spread, synchronizer
from lmmhooks.family import Family
from lmmhooks.methods.base import Method
from lmmhooks.patch import wrap
from lmmhooks.prompting import answer

__all__ = ["AnswerCost", "measure_answer"]


@dataclass(frozen=True)
class _Work:
    """One answer: milliseconds, positions that went through the decoder, and calls of the vision tower."""

    milliseconds: float
    positions: int
    encoded: int


@dataclass(frozen=True)
class AnswerCost:
    """
    Answers under a method against those of the plain model, in the same rounds.

    Attributes
    ----------
    methods
        Specifications of the methods.
    milliseconds, plain
        Per answer, the processor's work included.
    ratio
        Time over the plain model's.
    positions, positions_plain
        That went through the decoder for one answer, those of generated tokens included.
    encoded, encoded_plain
        Calls of the vision tower for one answer.
    """

    methods: list[str]
    milliseconds: Spread
    plain: Spread
    ratio: Spread
    positions: int
    positions_plain: int
    encoded: int
    encoded_plain: int


def measure_answer(
    model: PreTrainedModel,
    processor: Any,
    methods: Sequence[str | Method],
    prompt: str,
    size: tuple[int, int],
    repeat: int,
    answer_tokens: int,
) -> AnswerCost:
    """
    Measure answers about images that are new in every round, so that nothing of an earlier one is of use.

    Parameters
    ----------
    model
        An unwrapped model.
    processor
        Of the model.
    methods
        Methods composed into one patch, one of which looks before it answers.
    prompt
        The question.
    size
        Width and height of the images.
    repeat
        Rounds that count.
    answer_tokens
        Tokens of every answer, no more and no fewer.

    Raises
    ------
    LmmhooksError
        A method that cannot be used on this model.
    """
    kwargs = {"max_new_tokens": answer_tokens, "min_new_tokens": answer_tokens, "do_sample": False}
    rounds = {name: iter(range(10**6)) for name in ("plain", "patched")}
    with wrap(model, *methods, processor=processor) as patch:

        def plain() -> _Work:
            image = _noise(size, next(rounds["plain"]))
            with patch.disabled():
                return _worked(patch.family, lambda: answer(model, processor, image, prompt, **kwargs))

        def patched() -> _Work:
            image = _noise(size, next(rounds["patched"]))
            return _worked(patch.family, lambda: patch.answer(image, prompt, **kwargs))

        results = interleave({"plain": plain, "patched": patched}, repeat)
        theirs, ours = results["plain"], results["patched"]
        return AnswerCost(
            methods=[method.spec() for method in patch.methods],
            milliseconds=spread([one.milliseconds for one in ours]),
            plain=spread([one.milliseconds for one in theirs]),
            ratio=paired_ratio([one.milliseconds for one in ours], [one.milliseconds for one in theirs]),
            positions=ours[-1].positions,
            positions_plain=theirs[-1].positions,
            encoded=ours[-1].encoded,
            encoded_plain=theirs[-1].encoded,
        )


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _worked(family: Family, run: Callable[[], Any]) -> _Work:
    synchronize = synchronizer(family.model.device)
    with _counting(family) as counts:
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        elapsed = 1e3 * (time.perf_counter() - begin)
    return _Work(elapsed, counts["positions"], counts["encoded"])


@contextmanager
def _counting(family: Family) -> Iterator[dict[str, int]]:
    counts = {"positions": 0, "encoded": 0}

    def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        counts["positions"] += int(hidden.shape[1])

    def encoded(module: Any, args: tuple[Any, ...]) -> None:
        counts["encoded"] += 1

    handles = [
        family.layers[0].register_forward_pre_hook(read, with_kwargs=True),
        family.vision.register_forward_pre_hook(encoded),
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
