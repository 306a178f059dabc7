"""
A sweep over budgets as a results page: every method beside random tokens of the same budget, and beside fewer pixels.

A reducer is judged against what costs as much and takes no method at all. Questions that an image of fewer pixels still
answers say nothing about which tokens were kept; those that it gets wrong and the full image gets right are "group A"
(as in VTC-Bench), and shown on their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmmhooks_eval import stats
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.recipe import BASELINE, StatisticsSettings
from lmmhooks_eval.recipes import build
from lmmhooks_eval.report.markdown import setting_line
from lmmhooks_eval.score import Scored, compare, score_run, scored_answers
from lmmhooks_eval.store import read_config, read_samples
from lmmhooks_eval.sweep import split_name, variant_name
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import open_task

__all__ = ["by_method", "sweep_page", "sweep_record"]

REFERENCE, PIXELS = "random", "downsample"
_LEVEL = 0.05


def sweep_record(path: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a results page needs of a run with a sweep.

    Parameters
    ----------
    path
        The run folder.
    environment
        Its ``env.json``.

    Returns
    -------
    dict
        ``tasks``: per task the baseline and ``points``, one per method and budget: ``value`` and its ``interval``,
        ``against`` the random tokens of the same budget (``difference``, ``interval``, ``p_holm``), ``group_a`` (``n``,
        ``value``, ``interval``; None where answers are not right or wrong), and ``cost`` relative to the baseline
        (``tokens``, ``prefill_flops``, ``prefill_time``, ``kv_bytes``). ``own_number``: variants beside the sweep,
        which choose how many tokens they keep, with their difference to the baseline.

    Raises
    ------
    RecipeError
        The run has no sweep, or problems that forbid publishing it.
    """
    recipe = build(read_config(path), str(path))
    if recipe.sweep is None:
        raise RecipeError(f"{path} was no sweep: its recipe has no `sweep`; use scripts/store_results.py")
    metrics = score_run(path)
    if metrics["problems"]:
        raise RecipeError(f"{path} must not be published: {'; '.join(metrics['problems'])}")
    records = read_samples(path)
    tasks: dict[str, Any] = {}
    for plan in recipe.tasks:
        task, scored = open_task(plan), metrics["tasks"][plan.name]
        answers = scored_answers(records, plan, task)
        points = [
            _point(task, answers, scored["variants"][variant], variant, recipe.statistics)
            for variant in answers
            if split_name(variant) is not None
        ]
        tested = [point["against"] for point in points if point["against"] is not None]
        for against, p in zip(tested, stats.holm([against["p"] for against in tested]), strict=True):
            against["p_holm"] = p
        estimate = scored["variants"][BASELINE]["metrics"][task.primary.name]
        tasks[plan.name] = {
            "title": scored["title"],
            "metric": {"name": task.primary.name, "better": task.primary.better, "unit": task.primary.unit},
            "n": scored["variants"][BASELINE]["n"],
            "images": scored["variants"][BASELINE]["clusters"],
            "baseline": {"value": estimate["value"], "interval": estimate["interval"]},
            "points": points,
            "own_number": [
                _own_number(scored["variants"][variant], variant, task)
                for variant in answers
                if variant != BASELINE and split_name(variant) is None
            ],
        }
    return {"kind": "sweep", "model": recipe.model, "tasks": tasks, "environment": dict(environment)}


def _point(
    task: Task,
    answers: Mapping[str, Mapping[str, Scored]],
    figures: Mapping[str, Any],
    variant: str,
    settings: StatisticsSettings,
) -> dict[str, Any]:
    named = split_name(variant)
    assert named is not None
    method, budget = named
    metric, own = task.primary.name, answers[variant]
    against = None
    reference = answers.get(variant_name(REFERENCE, budget))
    if reference is not None and method != REFERENCE:
        compared = compare(task, reference, own, settings)
        estimate = compared["metrics"][metric]
        against = {
            "difference": estimate["difference"],
            "interval": estimate["difference_interval"],
            "p": compared["test"]["p"],
        }
    return {
        "method": method,
        "budget": budget,
        "value": figures["metrics"][metric]["value"],
        "interval": figures["metrics"][metric]["interval"],
        "against": against,
        "group_a": _group_a(task, answers, own, budget),
        "cost": _cost(figures),
    }


def _cost(figures: Mapping[str, Any]) -> dict[str, Any]:
    cost = figures["cost"]
    return {
        "tokens": None if cost["visual_kept"] is None else cost["visual_kept"] / cost["visual_in"],
        **{name: cost["relative"].get(name) for name in ("prefill_flops", "prefill_time", "kv_bytes")},
    }


def _own_number(figures: Mapping[str, Any], variant: str, task: Task) -> dict[str, Any]:
    estimate = figures["metrics"][task.primary.name]
    wanted = ("value", "interval", "difference", "difference_interval")
    return {"variant": variant, **{name: estimate[name] for name in wanted}, "cost": _cost(figures)}


def _group_a(
    task: Task, answers: Mapping[str, Mapping[str, Scored]], own: Mapping[str, Scored], budget: float
) -> dict[str, Any] | None:
    """Documents that the full image answers and fewer pixels do not."""
    full, small = answers.get(BASELINE, {}), answers.get(variant_name(PIXELS, budget))
    if small is None:
        return None
    outcomes = [answer.score[task.item_score] for answer in full.values()]
    if not np.isin(outcomes, (0, 1)).all():
        return None
    won = float(task.item_better == "higher")
    hard = [
        name
        for name, answer in full.items()
        if answer.score[task.item_score] == won
        and name in small
        and small[name].score[task.item_score] != won
        and name in own
    ]
    if not hard:
        return {"n": 0, "value": None, "interval": None}
    right = sum(own[name].score[task.item_score] == won for name in hard)
    return {"n": len(hard), "value": right / len(hard), "interval": list(stats.wilson(right, len(hard)))}


def sweep_page(record: Mapping[str, Any], link: str) -> str:
    """
    The section of one model in Markdown.

    Parameters
    ----------
    record
        As `sweep_record` makes it.
    link
        Where the record lies, relative to the page; plots lie beside it under the same name.
    """
    parts = [f"## {record['model']}\n\n{setting_line(record['environment'])} [{link}]({link})\n"]
    stem = link.removesuffix(".json")
    for name, task in record["tasks"].items():
        what = f"{task['title']}; {task['n']} documents about {task['images']} images."
        parts.append(f"### {name}\n\n{what}\n\n![{name}]({stem}-{name}.svg)\n")
        parts.append(f"{_table(task)}\n{_reading(task)}\n")
        if any(point["group_a"] for point in task["points"]):
            parts.append(f"{_group_table(task)}\n")
        if task["own_number"]:
            parts.append(f"{_own_table(task)}\n")
    return "\n".join(parts)


def _budgets(task: Mapping[str, Any]) -> list[float]:
    return sorted({point["budget"] for point in task["points"]}, reverse=True)


def by_method(task: Mapping[str, Any]) -> dict[str, dict[float, Mapping[str, Any]]]:
    """Points by method and budget, best methods first: by the mean difference to random tokens."""
    found: dict[str, dict[float, Mapping[str, Any]]] = {}
    for point in task["points"]:
        found.setdefault(point["method"], {})[point["budget"]] = point
    sign = -1 if task["metric"]["better"] == "lower" else 1

    def lead(points: Mapping[float, Mapping[str, Any]]) -> float:
        known = [point["against"]["difference"] for point in points.values() if point["against"]]
        return sign * float(np.mean(known)) if known else 0.0

    return dict(sorted(found.items(), key=lambda item: -lead(item[1])))


def _table(task: Mapping[str, Any]) -> str:
    budgets = _budgets(task)
    unit, scale = ("%", 100) if task["metric"]["unit"] == "share" else ("", 1)
    header = [f"{task['metric']['name']} {unit}".strip(), *(f"{100 * budget:g} % of tokens" for budget in budgets)]
    base = f"{scale * task['baseline']['value']:.1f}"
    rows = [["all tokens", *[base] * len(budgets)]]
    for method, points in by_method(task).items():
        rows.append([f"`{method}`", *(_cell(points.get(budget), scale) for budget in budgets)])
    return _markdown(header, rows)


def _cell(point: Mapping[str, Any] | None, scale: int) -> str:
    if point is None:
        return "-"
    value = f"{scale * point['value']:.1f}"
    against = point["against"]
    if against is None:
        return value
    text = f"{value} ({scale * against['difference']:+.1f})"
    return f"**{text}**" if against["p_holm"] < _LEVEL else text


def _reading(task: Mapping[str, Any]) -> str:
    sign = -1 if task["metric"]["better"] == "lower" else 1
    said = []
    for budget in _budgets(task):
        sides: dict[bool, list[str]] = {True: [], False: []}
        for point in task["points"]:
            against = point["against"]
            if point["budget"] == budget and against is not None and against["p_holm"] < _LEVEL:
                sides[sign * against["difference"] > 0].append(f"`{point['method']}`")
        better, worse = (", ".join(sorted(sides[side])) or "none" for side in (True, False))
        said.append(f"- {100 * budget:g} %: better than random tokens {better}; worse {worse}.")
    return "At 5 % after Holm's correction over this table:\n\n" + "\n".join(said) + "\n"


def _group_table(task: Mapping[str, Any]) -> str:
    budgets = [
        budget
        for budget in _budgets(task)
        if any(p["budget"] == budget and p["group_a"] and p["group_a"]["n"] for p in task["points"])
    ]
    if not budgets:
        return ""
    sizes = {p["budget"]: p["group_a"]["n"] for p in task["points"] if p["group_a"]}
    header = ["group A, % right", *(f"{100 * budget:g} % (n = {sizes[budget]})" for budget in budgets)]
    rows = []
    for method, points in by_method(task).items():
        if method == PIXELS:
            continue
        cells = []
        for budget in budgets:
            group = points[budget]["group_a"] if budget in points else None
            low, high = group["interval"] if group and group["n"] else (0.0, 0.0)
            cells.append(
                f"{100 * group['value']:.0f} [{100 * low:.0f}, {100 * high:.0f}]" if group and group["n"] else "-"
            )
        rows.append([f"`{method}`", *cells])
    return _markdown(header, rows)


def _own_table(task: Mapping[str, Any]) -> str:
    scale = 100 if task["metric"]["unit"] == "share" else 1
    rows = []
    for own in task["own_number"]:
        low, high = (scale * bound for bound in own["difference_interval"])
        tokens = "-" if own["cost"]["tokens"] is None else f"{100 * own['cost']['tokens']:.1f}"
        difference = f"{scale * own['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append([f"`{own['variant']}`", tokens, f"{scale * own['value']:.1f}", difference])
    header = ["chooses its own number", "% of tokens", task["metric"]["name"], "difference to all tokens"]
    return _markdown(header, rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
