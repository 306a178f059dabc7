"""Next-token scores of a generation, seen from the outside of the model as methods make them, before any processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lmmhooks.engines.attach import Attachments
from lmmhooks.engines.runtime import find_runtime

__all__ = ["watched_scores"]


@contextmanager
def watched_scores(model: nn.Module, hears: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """
    Tell somebody the scores of every step of the generations inside.

    Parameters
    ----------
    model
        Plain or wrapped; what is attached to it is taken off at the end.
    hears
        ``hears(scores, uncut)``, each ``[rows, vocabulary]``: what ``generate`` goes on with, and for the first token
        under a decoding method the same without its plausibility cut. A lazy method whose branches did not run on
        that token has only what it cut; both are the same tensor wherever nothing else is known. Rows are those of
        ``generate``, beams of a prompt side by side. Not to be changed in place.
    """
    attachments, runtime = Attachments(), find_runtime(model)
    depth = 0
    uncut: list[Tensor] = []

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        # Branches and questions of a method run inside a forward of the caller; a forward that failed has no output.
        if depth == 0 and output is not None:
            scores = output.logits[:, -1]
            hears(scores, uncut.pop() if uncut else scores)
            uncut.clear()

    # Around everything that is attached already: before its first hook, after its last.
    attachments.pre_hook(model, enter, "watched scores", first=True)
    attachments.hook(model, leave, "watched scores", always=True)
    if runtime is not None:
        runtime.hears_first_scores = uncut.append
    try:
        yield
    finally:
        if runtime is not None:
            runtime.hears_first_scores = None
        attachments.undo()
