"""
What the harness costs beyond the model: ``python -m lmmhooks_eval.overhead --model tiny-llava``.

The same batches are answered twice, in turn: by a bare loop (open images, processor, ``generate``, decode: what any
script has to do) and by the runner's pass (keys, accounting, parsing, scoring, synced writing). A benchmark, never a
timed test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmmhooks_eval.generate import Generator
from lmmhooks_eval.loading import load_model
from lmmhooks_eval.plan import Item, batches, prepare, select
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.recipe import BASELINE, Recipe, TaskPlan
from lmmhooks_eval.runner import Pass, Runner
from lmmhooks_eval.store import RunFolder
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import get_task

__all__ = ["Overhead", "measure_overhead"]


@dataclass(frozen=True)
class Overhead:
    """
    Seconds per repetition, and their ratio.

    Parameters
    ----------
    documents, batch_size
        What one repetition answers.
    bare_s, harness_s
        One entry per repetition, in turn.
    overhead
        Median over repetitions of harness / bare, minus 1.
    """

    documents: int
    batch_size: int
    bare_s: list[float]
    harness_s: list[float]
    overhead: float


def measure_overhead(
    model: Any,
    processor: Any,
    *,
    task: str = "scenes-pope",
    documents: int = 128,
    batch_size: int = 16,
    repeats: int = 5,
) -> Overhead:
    """
    Time the bare loop and the runner on the same batches of a loaded model.

    Parameters
    ----------
    model, processor
        Unpatched.
    task
        Whose documents are asked, with its own prompt and generation settings.
    documents
        About how many.
    batch_size, repeats
        Rows per batch; pairs of timings after one of each to warm up.

    Raises
    ------
    TaskError
        For an unknown task.
    """
    chosen = get_task(task)
    items = [prepare(chosen, doc, processor) for doc in select(chosen, chosen.load(), documents, seed=0)]
    planned = batches([item for item in items if item.error is None], batch_size)
    recipe = Recipe(name="overhead", model=str(model.name_or_path or "model"), tasks=[TaskPlan(name=task)])
    bare: list[float] = []
    harness: list[float] = []
    for repetition in range(repeats + 1):
        first = _timed(lambda: _bare(model, processor, chosen, planned))
        second = _timed(lambda: _harness(model, processor, recipe, chosen, planned))
        if repetition:  # the first pair warms up
            bare.append(first)
            harness.append(second)
    ratios = [second / first for first, second in zip(bare, harness, strict=True)]
    return Overhead(sum(map(len, planned)), batch_size, bare, harness, statistics.median(ratios) - 1)


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _bare(model: Any, processor: Any, task: Task, planned: Sequence[Sequence[Item]]) -> list[str]:
    texts: list[str] = []
    inputs_of = Generator(model, processor).inputs
    settings: Mapping[str, Any] = {**task.generation, "temperature": None, "top_p": None, "top_k": None}
    for batch in planned:
        inputs = inputs_of([item.prompt for item in batch], [task.images(item.doc) for item in batch])
        sequences = model.generate(**inputs, **settings)
        texts += processor.tokenizer.batch_decode(
            sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return texts


def _harness(model: Any, processor: Any, recipe: Recipe, task: Task, planned: Sequence[Sequence[Item]]) -> None:
    with tempfile.TemporaryDirectory() as scratch, RunFolder(Path(scratch), recipe.expanded()) as folder:
        runner = Runner(recipe, {BASELINE: ()}, model, processor, folder, RunProgress())
        runner.carry_out(Pass(recipe.tasks[0], task, BASELINE, (), dict(task.generation), planned))


def main() -> None:
    """Command line entry; prints JSON."""
    parser = argparse.ArgumentParser(description="Overhead of the harness over a bare generate() loop.")
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--task", default="scenes-pope")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    recipe = Recipe(name="overhead", model=given.model, tasks=[TaskPlan(name=given.task)])
    model, processor = load_model(recipe)
    result = measure_overhead(
        model,
        processor,
        task=given.task,
        documents=given.documents,
        batch_size=given.batch_size,
        repeats=given.repeats,
    )
    sys.stdout.write(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
