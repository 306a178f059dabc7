"""One run folder as a report sees it: figures, examples, configuration and environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmmhooks_eval.recipe import BASELINE
from lmmhooks_eval.recipes import build
from lmmhooks_eval.score import Scored, score_run, scored_answers
from lmmhooks_eval.store import CONFIG, ENVIRONMENT, read_config, read_samples
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import open_task

__all__ = ["Example", "RunView", "load_view"]

_EXAMPLES_EACH = 3


@dataclass(frozen=True)
class Example:
    """
    A document whose outcome a variant changed.

    Parameters
    ----------
    task, variant
        Where.
    outcome
        ``"fixed"`` or ``"broken"``.
    doc
        The document.
    prompt
        As rendered.
    baseline, patched
        The two raw answers.
    """

    task: Task
    variant: str
    outcome: str
    doc: Mapping[str, Any]
    prompt: str
    baseline: str
    patched: str


@dataclass(frozen=True)
class RunView:
    """
    What a report shows of one run.

    Parameters
    ----------
    path
        The run folder.
    metrics
        As in ``metrics.json``, scored now.
    examples
        Fixed and broken documents, a few of each for every task and variant.
    config, environment
        The texts of ``config.yaml`` and ``env.json``; the second is empty if the run never got that far.
    """

    path: Path
    metrics: Mapping[str, Any]
    examples: tuple[Example, ...]
    config: str
    environment: str

    @property
    def title(self) -> str:
        """Recipe and model."""
        return f"{self.metrics['recipe']} on {self.metrics['model']}"

    def environment_data(self) -> dict[str, Any]:
        """``env.json`` as data; empty if there is none."""
        data: dict[str, Any] = json.loads(self.environment) if self.environment else {}
        return data


def load_view(path: Path) -> RunView:
    """
    Score a run folder anew (into its ``metrics.json``) and collect what a report shows.

    Raises
    ------
    StoreError
        If the folder is no run.
    """
    recipe = build(read_config(path), str(path / CONFIG))
    metrics = score_run(path)
    records = read_samples(path)
    examples: list[Example] = []
    for plan in recipe.tasks:
        task = open_task(plan)
        answers = scored_answers(records, plan, task)
        for variant, figures in metrics["tasks"][plan.name]["variants"].items():
            if variant != BASELINE and "flips" in figures:
                examples += _examples(task, variant, figures["flips"], answers[BASELINE], answers[variant])
    environment = path / ENVIRONMENT
    return RunView(
        path=path,
        metrics=metrics,
        examples=tuple(examples),
        config=(path / CONFIG).read_text(encoding="utf-8"),
        environment=environment.read_text(encoding="utf-8") if environment.exists() else "",
    )


def _examples(
    task: Task, variant: str, flips: Mapping[str, Any], baseline: Mapping[str, Scored], patched: Mapping[str, Scored]
) -> list[Example]:
    return [
        Example(
            task,
            variant,
            outcome,
            baseline[doc_id].record["doc"],
            baseline[doc_id].record["prompt"],
            baseline[doc_id].record["text"],
            patched[doc_id].record["text"],
        )
        for outcome in ("fixed", "broken")
        for doc_id in flips[f"{outcome}_ids"][:_EXAMPLES_EACH]
    ]
