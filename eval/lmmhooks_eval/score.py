"""
Scoring stored answers: texts in, ``metrics.json`` out. No model is needed, so a changed parser costs seconds.

Answers are parsed and scored anew from their stored text and document, whatever the lines say. Every variant is
compared with the baseline on the documents both have answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmmhooks_eval import stats
from lmmhooks_eval.answers import Scored, scored_answers
from lmmhooks_eval.bias import AUC, TUNED_OFFSET, auc_estimates, offset_answers
from lmmhooks_eval.costs import summarise
from lmmhooks_eval.paper import check_figures, comparison
from lmmhooks_eval.recipe import BASELINE, Recipe, StatisticsSettings, TaskPlan
from lmmhooks_eval.recipes import build
from lmmhooks_eval.steps import USUAL_CUT, divergence, one_token_share, step_figures
from lmmhooks_eval.store import METRICS, Record, read_config, read_samples, write_atomically
from lmmhooks_eval.task import Metric, Task
from lmmhooks_eval.tasks import open_task

__all__ = ["Scored", "Tally", "compare", "score_run", "scored_answers"]


class Tally:
    """Running totals of one pass, for the progress bar."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._totals: dict[str, float] = {}

    def add(self, score: Mapping[str, float]) -> None:
        """Add the statistics of one document."""
        for name, value in score.items():
            self._totals[name] = self._totals.get(name, 0.0) + value

    def text(self) -> str:
        """The primary metric so far, e.g. ``"accuracy 91.4"``; empty before the first document."""
        if not self._totals:
            return ""
        figures = self._task.aggregate({name: np.asarray(value) for name, value in self._totals.items()})
        metric = self._task.primary
        return f"{metric.name} {float(figures[metric.name]) * (100 if metric.unit == 'share' else 1):.1f}"


def compare(
    task: Task, baseline: Mapping[str, Scored], patched: Mapping[str, Scored], settings: StatisticsSettings
) -> dict[str, Any]:
    """
    Every figure of a variant beside its baseline, over the documents both answered.

    Returns
    -------
    dict
        ``n``, ``clusters``, ``unpaired`` (documents only one of them has), ``metrics``, ``test``, ``flips`` with lists
        of document ids, ``divergence`` (see `lmmhooks_eval.steps.divergence`).
    """
    shared = [doc_id for doc_id in baseline if doc_id in patched]
    a, b = [baseline[doc_id] for doc_id in shared], [patched[doc_id] for doc_id in shared]
    result: dict[str, Any] = {"n": len(shared), "unpaired": len(baseline.keys() ^ patched.keys())}
    if not shared:
        return result | {"metrics": {}}
    clusters = [answer.record["cluster"] for answer in a]
    result["clusters"] = len(set(clusters))
    result["metrics"] = _estimates(task, a, b, settings) | auc_estimates(task, a, b, settings)
    before, after = _outcomes(task, a), _outcomes(task, b)
    name, p = stats.paired_test(before, after, settings.mid_p)
    difference = after - before
    result["test"] = {
        "name": name,
        "of": task.item_score,
        "difference": float(difference.mean()),
        "clustered_se": stats.clustered_se(difference, clusters),
        "p": p,
    }
    changed = [x.record["text"] != y.record["text"] for x, y in zip(a, b, strict=True)]
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        won = task.item_better == "higher"
        flips = stats.Flips.count(before == won, after == won)
        result["flips"] = {
            "both_right": flips.both_right,
            "fixed": flips.fixed,
            "broken": flips.broken,
            "both_wrong": flips.both_wrong,
            "net": flips.net,
            "fixed_ids": [i for i, x, y in zip(shared, before, after, strict=True) if x != won and y == won],
            "broken_ids": [i for i, x, y in zip(shared, before, after, strict=True) if x == won and y != won],
        }
        result["detectable_change"] = stats.detectable_change(flips.total, flips.discordant)
    result["changed_texts"] = sum(changed)
    result["divergence"] = divergence([answer.record for answer in a], [answer.record for answer in b])
    return result


def score_run(path: Path, *, write: bool = True) -> dict[str, Any]:
    """
    Score a run folder again and, unless told otherwise, write its ``metrics.json``.

    Parameters
    ----------
    path
        The run folder.
    write
        Replace the folder's file.

    Returns
    -------
    dict
        What ``metrics.json`` holds. ``problems`` lists, one line each, why the run must not count as a success.

    Raises
    ------
    StoreError
        If the folder is no run or its answers are damaged.
    RecipeError, TaskError
        If its recipe or tasks are not known to this installation.
    """
    recipe = build(read_config(path), str(path / "config.yaml"))
    records = read_samples(path)
    opened = {plan.name: open_task(plan) for plan in recipe.tasks}
    check_figures(recipe.paper, opened)
    tasks: dict[str, Any] = {}
    problems: list[str] = []
    for plan in recipe.tasks:
        task = opened[plan.name]
        scored = _score_task(recipe, plan, task, records, problems)
        scored["paper"] = comparison(recipe.paper, recipe.model, task, scored["variants"])
        tasks[task.name] = scored
    family = _correct(tasks)
    metrics = {
        "recipe": recipe.name,
        "model": recipe.model,
        "papers": [paper.model_dump(exclude={"results"}) for paper in recipe.paper],
        "statistics": {**recipe.statistics.model_dump(), "correction": "holm", "family_size": family},
        "tasks": tasks,
        "problems": problems,
    }
    if write:
        write_atomically(path / METRICS, json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return metrics


def _score_task(
    recipe: Recipe, plan: TaskPlan, task: Task, records: Sequence[Record], problems: list[str]
) -> dict[str, Any]:
    answers = scored_answers(records, plan, task)
    failed = {
        (record["variant"], record["doc_id"]): record["error"]
        for record in records
        if record["task"] == task.name and "error" in record
    }
    baseline = answers.get(BASELINE, {})
    result: dict[str, Any] = {
        "title": task.title,
        "licence": task.licence,
        "parser": plan.parser or next(iter(task.parsers)),
        "prompt": plan.prompt or next(iter(task.prompts)),
        "primary": task.primary.name,
        "metrics": {metric.name: {"better": metric.better, "unit": metric.unit} for metric in task.metrics},
        "variants": {},
    }
    reference = [scored.record for scored in baseline.values()]
    for variant in (BASELINE, *recipe.variants):
        own = answers.get(variant, {})
        unparsed = sum(not scored.clean for scored in own.values())
        lost = {doc_id: why for (name, doc_id), why in failed.items() if name == variant and doc_id not in own}
        figures = compare(task, baseline, own, recipe.statistics)
        lines = [scored.record for scored in own.values()]
        costs, steps = summarise(lines, reference), step_figures(reference, lines)
        told = {"failed": len(lost), "unparsed": unparsed, **figures, "steps": steps, "cost": costs}
        result["variants"][variant] = told
        place = f"{task.name}, {variant}"
        if not own:
            problems.append(f"{place}: no answers")
        if lost:
            doc_id, why = next(iter(lost.items()))
            problems.append(f"{place}: {len(lost)} failed, first {doc_id!r}: {why}")
        if own and unparsed > recipe.max_unparsed * len(own):
            problems.append(f"{place}: {unparsed} of {len(own)} answers could not be parsed")
        if figures["unpaired"]:
            problems.append(f"{place}: {figures['unpaired']} documents are not answered by both baseline and variant")
    result["steps"] = {"cut": USUAL_CUT, "one_token": one_token_share(reference, USUAL_CUT)}
    _add_bias(result, recipe, plan, task, baseline)
    return result


def _add_bias(
    result: dict[str, Any], recipe: Recipe, plan: TaskPlan, task: Task, baseline: Mapping[str, Scored]
) -> None:
    """The areas under the curve among the metrics, and the control that needs no run: the best fixed offset."""
    found = dict.fromkeys(name for figures in result["variants"].values() for name in figures["metrics"])
    areas = [name for name in found if name.rpartition("/")[2] == AUC]
    result["metrics"] |= {name: {"better": "higher", "unit": "share"} for name in areas}
    result["controls"] = {}
    tuned = offset_answers(task, baseline, recipe.statistics.seed, plan.parser)
    if tuned is not None:
        answers, offsets = tuned
        figures = compare(task, baseline, answers, recipe.statistics)
        for name in areas:  # moving the line between the answers ranks nothing anew
            figures["metrics"].pop(name)
        figures.pop("divergence")
        result["controls"][TUNED_OFFSET] = {"offsets": offsets, "failed": 0, "unparsed": 0, **figures}


def _estimates(task: Task, a: Sequence[Scored], b: Sequence[Scored], settings: StatisticsSettings) -> dict[str, Any]:
    clusters = sorted({answer.record["cluster"] for answer in a})
    names = sorted({name for answer in (*a, *b) for name in answer.score})
    before, after = _per_cluster(a, clusters, names), _per_cluster(b, clusters, names)

    def aggregate(totals: np.ndarray) -> Mapping[str, np.ndarray]:
        return task.aggregate(dict(zip(names, totals, strict=True)))

    estimates = stats.paired_bootstrap(before, after, aggregate, settings.draws, settings.confidence, settings.seed)
    totals = dict(zip(names, after.sum(axis=0), strict=True))
    result = {}
    for metric in task.metrics:
        if metric.name not in estimates:
            continue
        estimate = estimates[metric.name]
        proportion = _proportion(metric, totals)
        interval, method = estimate.interval, "cluster-bootstrap"
        if proportion is not None and len(clusters) == len(a):
            interval, method = stats.wilson(*proportion, settings.confidence), "wilson"
        result[metric.name] = {
            "value": estimate.value,
            "n": proportion[1] if proportion is not None else len(a),
            "interval": list(interval),
            "interval_method": method,
            "baseline": estimate.baseline,
            "difference": estimate.difference,
            "difference_interval": list(estimate.difference_interval),
            "p": estimate.p,
        }
    return result


def _proportion(metric: Metric, totals: Mapping[str, float]) -> tuple[float, int] | None:
    """Successes and trials of a metric that is a plain proportion."""
    if metric.proportion is None or metric.proportion[1] not in totals:
        return None
    successes, trials = metric.proportion
    return totals.get(successes, 0.0), round(totals[trials])


def _per_cluster(answers: Sequence[Scored], clusters: Sequence[str], names: Sequence[str]) -> np.ndarray:
    row = {cluster: index for index, cluster in enumerate(clusters)}
    matrix = np.zeros((len(clusters), len(names)))
    for answer in answers:
        matrix[row[answer.record["cluster"]]] += [answer.score.get(name, 0.0) for name in names]
    return matrix


def _outcomes(task: Task, answers: Sequence[Scored]) -> np.ndarray:
    return np.asarray([answer.score[task.item_score] for answer in answers], dtype=float)


def _correct(tasks: Mapping[str, Any]) -> int:
    """Holm's correction over every paired test of the run, which is what one table shows; returns their number."""
    tests = [
        figures["test"]
        for task in tasks.values()
        for variant, figures in {**task["variants"], **task["controls"]}.items()
        if variant != BASELINE and "test" in figures
    ]
    for test, adjusted in zip(tests, stats.holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted
    return len(tests)
