"""One loaded model that answers questions one after the other, as it is and under methods, and tells how far it is."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from lmmhooks.comparison import Comparison, compare
from lmmhooks.errors import LmmhooksError, PromptError
from lmmhooks.family import resolve as resolve_family
from lmmhooks.methods.base import Method
from lmmhooks.methods.decoding.search import SearchMethod
from lmmhooks.patch import wrap
from lmmhooks.playground.choices import read
from lmmhooks.prompting import open_image

__all__ = ["Progress", "Session", "sentence"]

PAUSE = 0.05
"""Seconds between two looks at a growing answer."""
BEAMS = 5
"""Of methods that judge beams, as published; the baseline beside them searches as many."""


def sentence(error: BaseException) -> str:
    """
    What a page says about an error.

    Errors of the library are sentences already. Of anything else the page shows type and first line; the traceback
    goes to the terminal in which the playground was started.
    """
    if isinstance(error, LmmhooksError):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    first = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {first} (the terminal has the traceback)"


@dataclass(frozen=True)
class Progress:
    """
    How far a question is.

    Attributes
    ----------
    baseline, patched
        The answers so far.
    comparison
        Everything about both once they are complete, else None.
    stopped
        Whether the answers end here because somebody asked for it.
    """

    baseline: str = ""
    patched: str = ""
    comparison: Comparison | None = None
    stopped: bool = False


class Session:
    """
    A model, asked by one question at a time.

    Parameters
    ----------
    model, processor
        As `lmmhooks.load` returns them; the model must not be wrapped.
    name
        What the page calls the model.

    Attributes
    ----------
    family
        What was resolved about the model.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.family = resolve_family(model)
        self._busy = threading.Lock()
        self._stop = threading.Event()

    def ask(self, image: Any, question: str, methods: str, max_new_tokens: int = 64) -> Iterator[Progress]:
        """
        Answer a question as the model is, then under methods.

        Parameters
        ----------
        image
            A PIL image or a path.
        question
            Plain text; the chat template is applied.
        methods
            A composition, such as ``"fastv(keep=0.5) + pai"``.
        max_new_tokens
            Longest answer, in tokens.

        Yields
        ------
        Progress
            The first says that the question was taken; then while text comes in, which it does not from beam search.
            The last one holds the comparison, unless `stop` ended the answer before.

        Raises
        ------
        LmmhooksError
            The image, the question or a method cannot be used, or another question is being answered.
        """
        variant = read(methods)
        if image is None:
            raise PromptError("no image is chosen; choose an example or drop a picture")
        if not question.strip():
            raise PromptError("the question is empty; write one")
        opened = open_image(image)
        if not self._busy.acquire(blocking=False):
            raise PromptError("another question is being answered; wait until it is done, or stop it")
        events: Queue[Comparison | BaseException | None] = Queue()
        self._stop.clear()
        stream = _Stream(self.processor.tokenizer)
        work = (opened, question, variant, max_new_tokens, stream, events)
        worker = threading.Thread(target=self._work, args=work, daemon=True)
        worker.start()
        try:
            # From here on `stop` is heard.
            yield Progress()
            yield from _follow(stream, events)
        finally:
            # Whoever listened may have gone before the end: nothing goes on in the background.
            self._stop.set()
            worker.join()
            self._busy.release()

    def stop(self) -> None:
        """End the answer that is being given, at its next token; does nothing when there is none."""
        self._stop.set()

    def _work(
        self,
        image: Any,
        question: str,
        variant: list[Method],
        max_new_tokens: int,
        stream: _Stream,
        events: Queue[Comparison | BaseException | None],
    ) -> None:
        try:
            # A method that refuses the model does so before the baseline takes its time.
            wrap(self.model, *variant, processor=self.processor).remove()
            settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stopping_criteria": [_Stop(self._stop)]}
            if any(isinstance(part, SearchMethod) for method in variant for part in method.parts()):
                # What beams say changes until the end: there is nothing to stream.
                settings["num_beams"] = BEAMS
            else:
                settings["streamer"] = stream
            events.put(compare(self.model, self.processor, image, question, [variant], **settings))
        except _Stopped:
            events.put(None)
        except BaseException as error:
            # Raised again where the question was asked; a thread has nobody to tell.
            events.put(error)


def _follow(stream: _Stream, events: Queue[Comparison | BaseException | None]) -> Iterator[Progress]:
    """Progress until the worker reports its result."""
    shown = Progress()
    while True:
        try:
            result = events.get(timeout=PAUSE)
        except Empty:
            now = Progress(*stream.texts)
            if now != shown:
                shown = now
                yield now
            continue
        if isinstance(result, BaseException):
            raise result
        if result is None:
            yield Progress(*stream.texts, stopped=True)
        else:
            baseline, patched = result.runs
            yield Progress(baseline.text, patched.text, result)
        return


class _Stopped(Exception):
    """Raised inside ``generate`` to end it."""


class _Stop(StoppingCriteria):
    """Never satisfied; raises where somebody asked for the end, which ends searches and replies in batches as well."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._stop.is_set():
            raise _Stopped
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Stream(BaseStreamer):
    """
    Texts of the baseline and of the patched model as they grow.

    ``generate`` hands over the prompt, every token, and an end. The first end is the baseline's; a method that
    generates several times for one answer shows the newest of them, and nothing of those it asks as a batch.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.texts: tuple[str, str] = ("", "")
        self._tokenizer = tokenizer
        self._turn = 0
        self._tokens: list[int] | None = None
        self._rows = 0

    def put(self, value: Any) -> None:
        if self._tokens is None:
            self._tokens, self._rows = [], len(value)
            return
        if self._rows > 1:
            return
        # Decoded as a whole: a token may be a part of a letter, and what it adds depends on those before it.
        self._tokens.extend(int(token) for token in value.flatten())
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True).strip()
        self.texts = (text, "") if self._turn == 0 else (self.texts[0], text)

    def end(self) -> None:
        self._turn, self._tokens = 1, None
