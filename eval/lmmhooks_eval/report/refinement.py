"""
Methods that look again beside crops that nothing was looked at for, as a results page.

A second look costs passes and tokens, so a method is held against the untouched model and against the best of the
controls of its run: the image twice, its middle, any part of it, or more pixels. Methods that are told where to look
are no controls, and have no place among those that find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmmhooks_eval import stats
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.recipe import BASELINE, Recipe
from lmmhooks_eval.recipes import build
from lmmhooks_eval.report.markdown import setting_line
from lmmhooks_eval.score import Scored, compare, score_run, scored_answers
from lmmhooks_eval.store import read_config, read_samples
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import open_task

__all__ = ["CONTROLS", "TOLD", "looks_again", "refinement_page", "refinement_record"]

CONTROLS = frozenset({"same-image-twice", "budget-matched", "centre-crop", "random-crop"})
"""Methods that know nothing of the question."""
TOLD = frozenset({"oracle-crop", "controlmllm"})
"""Methods that are told where to look."""

_LEVEL = 0.05


def looks_again(recipe: Recipe) -> bool:
    """Whether a recipe has methods of kind refinement."""
    return any(method.kind == "refinement" for built in recipe.methods().values() for method in built)


def refinement_record(path: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a results page needs of a run of methods that look again.

    Parameters
    ----------
    path
        The run folder.
    environment
        Its ``env.json``.

    Returns
    -------
    dict
        ``model`` and ``tasks``: per task ``title``, ``metric``, ``n``, ``images``, ``groups`` (accuracies beside the
        first metric that stand in the table), ``best_control`` and ``variants``. Of a variant: ``role`` (``method``,
        ``told``, ``control`` or ``baseline``), ``value`` and ``interval``, ``difference`` to the baseline with
        interval, p and p_holm, ``against`` the best control likewise (methods alone), ``flips``, ``groups``, and per
        answer ``passes``, ``visual_tokens`` (all passes) and ``time`` (relative to the baseline, measured).

    Raises
    ------
    RecipeError
        The run has no such methods, or problems that forbid publishing it.
    """
    recipe = build(read_config(path), str(path))
    if not looks_again(recipe):
        raise RecipeError(f"{path} has no method of kind refinement; use scripts/store_results.py without --refinement")
    metrics = score_run(path)
    if metrics["problems"]:
        raise RecipeError(f"{path} must not be published: {'; '.join(metrics['problems'])}")
    records = read_samples(path)
    roles = _roles(recipe)
    tasks = {}
    for plan in recipe.tasks:
        task = open_task(plan)
        tasks[plan.name] = _task(recipe, task, scored_answers(records, plan, task), metrics["tasks"][plan.name], roles)
    return {"kind": "refinement", "model": recipe.model, "tasks": tasks, "environment": dict(environment)}


def _roles(recipe: Recipe) -> dict[str, str]:
    roles = {}
    for variant, built in recipe.methods().items():
        ids = {method.id for method in built}
        role = "control" if ids <= CONTROLS else "told" if ids & TOLD else "method"
        roles[variant] = role if built else "baseline"
    return roles


def _task(
    recipe: Recipe,
    task: Task,
    answers: Mapping[str, Mapping[str, Scored]],
    scored: Mapping[str, Any],
    roles: Mapping[str, str],
) -> dict[str, Any]:
    metric = task.primary
    sign = -1 if metric.better == "lower" else 1
    values = {name: sign * scored["variants"][name]["metrics"][metric.name]["value"] for name in roles}
    controls = [name for name, role in roles.items() if role == "control"]
    best = max(controls, key=values.__getitem__, default=None)
    groups = [one.name for one in task.metrics if one.name.endswith(f"/{metric.name}")]
    variants = {}
    for name, role in roles.items():
        figures = scored["variants"][name]
        estimate = figures["metrics"][metric.name]
        flips = figures.get("flips", {})
        variants[name] = {
            "role": role,
            "value": estimate["value"],
            "interval": estimate["interval"],
            "difference": None if role == "baseline" else _tested(figures, metric.name),
            "against": None,
            "flips": {side: flips.get(side) for side in ("fixed", "broken")},
            "groups": {group: figures["metrics"][group]["value"] for group in groups if group in figures["metrics"]},
            **_costs(answers[name], answers[BASELINE]),
        }
        if best is not None and role == "method":
            variants[name]["against"] = _tested(
                compare(task, answers[best], answers[name], recipe.statistics), metric.name
            )
    for what in ("difference", "against"):
        tests = [figures[what] for figures in variants.values() if figures[what] is not None]
        for test, p in zip(tests, stats.holm([test["p"] for test in tests]), strict=True):
            test["p_holm"] = p
    return {
        "title": task.title,
        "metric": {"name": metric.name, "better": metric.better, "unit": metric.unit},
        "n": scored["variants"][BASELINE]["n"],
        "images": scored["variants"][BASELINE]["clusters"],
        "groups": groups,
        "best_control": best,
        "variants": variants,
    }


def _tested(figures: Mapping[str, Any], metric: str) -> dict[str, Any]:
    estimate = figures["metrics"][metric]
    return {
        "difference": estimate["difference"],
        "interval": estimate["difference_interval"],
        "p": figures["test"]["p"],
    }


def _costs(own: Mapping[str, Scored], base: Mapping[str, Scored]) -> dict[str, Any]:
    """Passes and visual tokens per answer; time per answer over the baseline's, median over the same documents."""

    def seconds(answer: Scored) -> float:
        record = answer.record
        spent = record["batch_preprocess_ms"] + record["batch_prefill_ms"] + (record["batch_decode_ms"] or 0.0)
        return float(spent) / float(record["batch_size"])

    shared = [doc for doc in own if doc in base]
    return {
        "passes": float(np.mean([answer.record.get("passes", 1) for answer in own.values()])),
        "visual_tokens": float(np.mean([answer.record["visual_tokens"] for answer in own.values()])),
        "time": float(np.median([seconds(own[doc]) / seconds(base[doc]) for doc in shared])),
    }


# -- the page ----------------------------------------------------------------------------------------------------------


def refinement_page(record: Mapping[str, Any], link: str) -> str:
    """
    The section of one model in Markdown.

    Parameters
    ----------
    record
        As `refinement_record` makes it.
    link
        Where it lies, relative to the page.
    """
    parts = [f"## {record['model']}\n\n{setting_line(record['environment'])} [{link}]({link})\n"]
    for name, task in record["tasks"].items():
        parts.append(f"### {name}\n\n{task['title']}; {task['n']} documents about {task['images']} images.\n")
        parts.append(f"{_table(task)}\n{_reading(task)}")
        if task["groups"]:
            parts.append(_by_group(task))
    return "\n".join(parts)


def _table(task: Mapping[str, Any]) -> str:
    best = task["best_control"]
    header = [f"{task['metric']['name']} %", "value", "difference", f"to `{best}`" if best else "to controls"]
    header += ["fixed", "broken", "passes", "visual tokens", "time"]
    rows = []
    for name, figures in _sorted(task):
        low, high = (100 * bound for bound in figures["interval"])
        flips = ["-" if figures["flips"][side] is None else str(figures["flips"][side]) for side in ("fixed", "broken")]
        rows.append(
            [
                _named([name]) if figures["role"] == "method" else f"*{_named([name])}*",
                f"{100 * figures['value']:.1f} [{low:.1f}, {high:.1f}]",
                _difference(figures["difference"]),
                _difference(figures["against"]),
                *(["-", "-"] if figures["role"] == "baseline" else flips),
                f"{figures['passes']:.1f}",
                f"{figures['visual_tokens']:.0f}",
                f"{figures['time']:.1f}",
            ]
        )
    return _markdown(header, rows)


def _by_group(task: Mapping[str, Any]) -> str:
    groups = [group for group in task["groups"] if any(group in f["groups"] for f in task["variants"].values())]
    rows = [
        [
            _named([name]) if figures["role"] == "method" else f"*{_named([name])}*",
            *(f"{100 * figures['groups'][group]:.1f}" if group in figures["groups"] else "-" for group in groups),
        ]
        for name, figures in _sorted(task)
    ]
    suffix = f"/{task['metric']['name']}"
    return _markdown([f"{task['metric']['name']} %", *(group.removesuffix(suffix) for group in groups)], rows)


def _sorted(task: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The baseline first, then methods, controls and those that are told, each from best to worst."""
    sign = -1 if task["metric"]["better"] == "lower" else 1
    order = ("baseline", "method", "control", "told")
    return sorted(task["variants"].items(), key=lambda item: (order.index(item[1]["role"]), -sign * item[1]["value"]))


def _reading(task: Mapping[str, Any]) -> str:
    sign = -1 if task["metric"]["better"] == "lower" else 1
    methods = {name: f for name, f in task["variants"].items() if f["role"] == "method"}
    said = []
    better, worse, _ = _sides({name: f["difference"] for name, f in methods.items()}, sign)
    said.append(f"Of {len(methods)} methods, surely better than the untouched model: {better}; surely worse: {worse}.")
    if best := task["best_control"]:
        control = task["variants"][best]
        better, worse, open_ = _sides({name: f["against"] for name, f in methods.items()}, sign)
        said.append(
            f"The best control is `{best}` ({100 * control['value']:.1f} %). Surely better than it: {better}; surely "
            f"worse: {worse}; not better as far as this run can tell: {open_}."
        )
    told = [(name, f) for name, f in task["variants"].items() if f["role"] == "told"]
    if told and methods:
        name, most = max(told, key=lambda item: sign * item[1]["value"])
        first = max(methods, key=lambda one: sign * methods[one]["value"])
        base = task["variants"][BASELINE]["value"]
        gain, possible = sign * (methods[first]["value"] - base), sign * (most["value"] - base)
        share = f", {100 * gain / possible:.0f} % of it" if possible > 0 else ""
        said.append(
            f"Told where to look, `{name}` gains {100 * possible:+.1f}; the best method, `{first}`, gains "
            f"{100 * gain:+.1f}{share}."
        )
    return "".join(f"- {line}\n" for line in said)


def _sides(tests: Mapping[str, Mapping[str, Any]], sign: int) -> tuple[str, str, str]:
    """Names of what is surely better, surely worse, and neither, after Holm's correction."""
    sides: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for name, test in tests.items():
        sure = test["p_holm"] < _LEVEL
        sides[(1 if sign * test["difference"] > 0 else -1) if sure else 0].append(name)
    return _named(sides[1]), _named(sides[-1]), _named(sides[0])


def _difference(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "-"
    low, high = (100 * bound for bound in test["interval"])
    text = f"{100 * test['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if test["p_holm"] < _LEVEL else text


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
