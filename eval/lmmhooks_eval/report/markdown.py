"""
A scored run as a Markdown section for a results page: setting, one table per task, and what may be read from it.

Everything is written by rule from ``metrics.json`` and ``env.json``, the reading too, so that a page cannot claim more
than its run shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmmhooks_eval.recipe import BASELINE
from lmmhooks_eval.report.tables import Cell, headline, metric_cell, notes

__all__ = ["BESIDE", "condensed", "results", "setting_line"]

# What a first metric must not be read without: fewer hallucinations come free with shorter captions or lower recall,
# and accuracy with a changed readiness to say yes.
BESIDE = ("auc", "chair_i", "recall", "precision", "length", "f1", "yes_ratio")
_LEVEL = 0.05


def condensed(metrics: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """What a results page needs of a run, without the lists of documents that changed sides."""
    tasks = {}
    for name, task in metrics["tasks"].items():
        variants = {}
        for variant, figures in task["variants"].items():
            flips = {key: value for key, value in figures.get("flips", {}).items() if not key.endswith("_ids")}
            variants[variant] = {**figures, **({"flips": flips} if flips else {})}
        tasks[name] = {**task, "variants": variants}
    return {"kind": "results", "metrics": {**metrics, "tasks": tasks}, "environment": dict(environment)}


def results(record: Mapping[str, Any], link: str) -> str:
    """
    The section of one run.

    Parameters
    ----------
    record
        As `condensed` makes it.
    link
        Where the record lies, relative to the page.
    """
    metrics, environment = record["metrics"], record["environment"]
    parts = [f"## {metrics['model']}\n\n{setting_line(environment)} [{link}]({link})\n"]
    for name, task in metrics["tasks"].items():
        parts.append(f"### {name}\n\n{task['title']}.\n\n{_table(name, task)}\n{_reading(task)}\n")
    parts.append("\n".join(f"- {line}" for line in notes(metrics)) + "\n")
    return "\n".join(parts)


def setting_line(environment: Mapping[str, Any]) -> str:
    """Machine, versions and commit of a run, as one sentence."""
    versions, model = environment["versions"], environment["model"]
    dirty = " with uncommitted changes" if environment["dirty"] else ""
    said = [
        environment["device_name"],
        f"{model['dtype']}, {model['attention']}",
        f"torch {versions['torch']}",
        f"transformers {versions['transformers']}",
        f"commit {str(environment['commit'])[:8]}{dirty}",
        str(environment["started"])[:10],
    ]
    return ", ".join(said) + "."


def _table(name: str, task: Mapping[str, Any]) -> str:
    shown = headline(name, task)
    beside = [metric for metric in BESIDE if metric in task["metrics"] and metric != task["primary"]]
    # The headline's last column counts failures, of which a run that is published has none.
    header = [*shown.columns[:-1], *beside]
    rows = []
    for row in shown.rows:
        variant = row[0].text
        cells = [Cell(f"`{variant}`"), *row[1:-1]]
        cells += [metric_cell(task, variant, metric) for metric in beside]
        rows.append([f"**{cell.text}**" if cell.tone else cell.text for cell in cells])
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _reading(task: Mapping[str, Any]) -> str:
    metric = task["primary"]
    better = task["metrics"][metric]["better"]
    others = {name: figures for name, figures in task["variants"].items() if name != BASELINE and figures["n"]}
    sure = {name: figures for name, figures in others.items() if figures["test"]["p_holm"] < _LEVEL}
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name, figures in sure.items():
        difference = figures["metrics"][metric]["difference"]
        sides[(difference > 0) == (better == "higher")].append(name)
    unchanged = [name for name, figures in others.items() if figures["changed_texts"] == 0]
    said = [
        f"Of {len(others)} methods, at {100 * _LEVEL:g} % after Holm's correction: better than the baseline "
        f"{_named(sides[True])}, worse {_named(sides[False])}."
    ]
    if unchanged:
        said.append(f"Not one answer was changed by {_named(unchanged)}.")
    return " ".join(said) + "\n"


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
