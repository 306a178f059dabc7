"""
What decoding branches cost on captions, and what is saved by running them only on steps they can change.

A step on which the plausibility cut leaves one token is decided without the branches; how many such steps there are is
a matter of the model and of what it writes, so that this takes trained weights. A benchmark, never a timed test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lmmhooks.bench.timing import Spread, interleave, paired_ratio
from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method
from lmmhooks.methods.decoding.base import DecodingMethod
from lmmhooks.patch import wrap
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import prepare, select
from lmmhooks_eval.tasks import get_task

__all__ = ["BranchCost", "measure_branches"]


@dataclass(frozen=True)
class BranchCost:
    """
    One method on the captions of one model.

    Attributes
    ----------
    method
        Its specification.
    steps, steps_run
        Steps of all captions, and those on which lazy branches ran.
    documents, identical
        Captions, and how many are token by token the same with lazy branches.
    eager, lazy
        Time per token of a caption, its prompt included, over the plain model's in the same round: with branches on
        every step, and with lazy ones.
    """

    method: str
    steps: int
    steps_run: int
    documents: int
    identical: int
    eager: Spread
    lazy: Spread

    @property
    def ambiguous(self) -> float:
        """Share of steps on which more than one token was plausible."""
        return self.steps_run / self.steps


@dataclass(frozen=True)
class _Captions:
    """One way of answering all documents: tokens of each, seconds per token, and on how many steps branches ran."""

    answers: list[list[int]]
    seconds: float
    steps_run: int


def measure_branches(
    model: Any,
    processor: Any,
    methods: Sequence[Method],
    *,
    task: str = "scenes-caption",
    documents: int = 8,
    repeat: int = 3,
    seed: int = 0,
) -> list[BranchCost]:
    """
    Caption images one by one: plain, with the branches of every method on every step, and with lazy ones.

    Parameters
    ----------
    model, processor
        Unpatched.
    methods
        Such as can be lazy.
    task
        Whose documents are captioned, with its own prompt and generation settings.
    documents
        About how many.
    repeat
        Rounds that count; each runs all alternatives.
    seed
        Of the choice of documents.

    Raises
    ------
    LmmhooksError
        For an unknown task, and for a method that cannot be lazy or cannot be used on this model.
    """
    branching = [method for method in methods if isinstance(method, DecodingMethod)]
    if len(branching) < len(methods):
        other = next(method for method in methods if method not in branching)
        raise MethodError(f"{other.id} has no branches that could be lazy; give decoding methods such as vcd or m3id")
    chosen = get_task(task)
    items = [prepare(chosen, doc, processor) for doc in select(chosen, chosen.load(), documents, seed=seed)]
    generator = Generator(model, processor)
    prompts = [generator.inputs([item.prompt], [chosen.images(item.doc)]) for item in items if item.error is None]
    settings = {**chosen.generation, "temperature": None, "top_p": None, "top_k": None}
    caption = partial(_caption, model, processor, prompts, settings)
    actions: dict[str, Callable[[], _Captions]] = {"plain": caption}
    for number, method in enumerate(branching):
        actions[f"eager {number}"] = partial(caption, replace(method, lazy=False))
        actions[f"lazy {number}"] = partial(caption, replace(method, lazy=True))
    results = interleave(actions, repeat)
    plain = [one.seconds for one in results["plain"]]
    found = []
    for number, method in enumerate(branching):
        eager, lazy = results[f"eager {number}"], results[f"lazy {number}"]
        pairs = zip(eager[0].answers, lazy[0].answers, strict=True)
        found.append(
            BranchCost(
                method=method.spec(),
                steps=sum(map(len, lazy[0].answers)),
                steps_run=lazy[0].steps_run,
                documents=len(prompts),
                identical=sum(one == other for one, other in pairs),
                eager=paired_ratio([one.seconds for one in eager], plain),
                lazy=paired_ratio([one.seconds for one in lazy], plain),
            )
        )
    return found


@torch.inference_mode()
def _caption(
    model: Any, processor: Any, prompts: Sequence[Any], settings: dict[str, Any], *methods: DecodingMethod
) -> _Captions:
    answers, seconds, steps_run = [], 0.0, 0.0
    with wrap(model, *methods, processor=processor) if methods else nullcontext() as patch:
        for inputs in prompts:
            started = time.perf_counter()
            sequence = model.generate(**inputs, **settings)
            answers.append(sequence[0, inputs["input_ids"].shape[1] :].tolist())  # waits for the device
            seconds += time.perf_counter() - started
            if patch is not None:
                steps_run += (patch.stats.branch_steps or 0.0) * len(answers[-1])
    return _Captions(answers, seconds / sum(map(len, answers)), round(steps_run))
