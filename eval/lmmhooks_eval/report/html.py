"""The report as one HTML file that needs nothing else: styles, plots and example images are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lmmhooks_eval.environment import now
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.report.plots import cost_quality_plot, difference_plot
from lmmhooks_eval.report.tables import cost_table, headline, metrics_table, notes, paper_table, steps_table
from lmmhooks_eval.report.view import Example, RunView
from lmmhooks_eval.store import write_atomically

__all__ = ["render", "write_html"]

_THUMBNAIL = 256  # pixels on the longer side: enough to see why an answer is wrong, small enough to inline dozens


def write_html(views: Sequence[RunView], path: Path) -> Path:
    """Write the page of one or several runs; returns its path. Raises OSError if it cannot be written."""
    return write_atomically(path, render(views))


def render(views: Sequence[RunView]) -> str:
    """The page as text. Everything that comes from a recipe, a document or a model is escaped."""
    loader = PackageLoader("lmmhooks_eval.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("report.html.j2")
    return template.render(runs=[_run(view) for view in views], created=now())


def _run(view: RunView) -> dict[str, Any]:
    examples: dict[str, list[dict[str, Any]]] = {}
    for example in view.examples:
        examples.setdefault(example.task.name, []).append(_example(example))
    return {
        "title": view.title,
        "environment_data": view.environment_data(),
        "problems": view.metrics["problems"],
        "notes": notes(view.metrics),
        "tasks": [
            {
                "name": name,
                "headline": headline(name, task),
                "paper": paper_table(name, task),
                "metrics": metrics_table(name, task),
                "steps": steps_table(name, task),
                "cost": cost_table(name, task),
                "plots": _plots(f"{view.path}/{name}", task),
                "examples": examples.get(name, []),
                "reading": f"prompt: {task['prompt']}; parser: {task['parser']}; data: {task['licence']}",
            }
            for name, task in view.metrics["tasks"].items()
        ],
        "config": view.config,
        "environment": view.environment,
    }


def _plots(name: str, task: Any) -> list[Markup]:
    drawn = (difference_plot(task, name), cost_quality_plot(task, name))
    # The SVG is ours: matplotlib escapes the labels it writes into it.
    return [Markup(svg) for svg in drawn if svg is not None]


def _example(example: Example) -> dict[str, Any]:
    doc = example.doc
    asked = doc.get("question") or doc.get("prompt") or example.prompt
    gold = doc.get("label") or doc.get("answer") or doc.get("objects")
    return {
        "variant": example.variant,
        "outcome": example.outcome,
        "id": doc["id"],
        "asked": asked,
        "gold": ", ".join(map(str, gold)) if isinstance(gold, (list, tuple)) else gold,
        "baseline": example.baseline,
        "patched": example.patched,
        "images": _inline_images(example),
    }


def _inline_images(example: Example) -> list[str]:
    """Data URIs; none where the data are gone since the run, which leaves the texts of the example."""
    try:
        images = [image.convert("RGB") for image in example.task.images(example.doc)]
    except (OSError, TaskError):
        return []
    result = []
    for image in images:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        stream = io.BytesIO()
        image.save(stream, format="PNG", optimize=True)
        result.append(f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}")
    return result
