"""``lmmhooks tasks [NAME]``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmmhooks.cli.output import JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from lmmhooks_eval.task import Task

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Task to describe; unset: list all.")] = None,
    json: JsonOption = False,
) -> None:
    """List tasks, or describe one: data, prompts, parsers, metrics, generation settings, licence."""
    from lmmhooks_eval.tasks import discover, get_task

    if name is not None:
        task = get_task(name)
        bundled = task.at is None
        details = {
            **_summary(task),
            # Counting the documents of other data would mean to download them.
            "source": asdict(task.source()),
            "documents": len(task.load()) if bundled else None,
        }
        if json:
            print_json(details)
        else:
            print_table(["field", "value"], [[key, _shown(value)] for key, value in details.items()])
        return
    found = discover()
    if json:
        listed = {key: _summary(task) for key, task in sorted(found.tasks.items())}
        print_json({"tasks": listed, "failed": list(found.failures)})
    else:
        rows = [[key, task.primary.name, task.licence, task.title] for key, task in sorted(found.tasks.items())]
        print_table(["task", "leads with", "licence", "title"], rows)
    for failure in found.failures:
        note(f"warning: {failure}")


def _summary(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "title": task.title,
        "licence": task.licence,
        "prompts": dict(task.prompts),
        "parsers": list(task.parsers),
        "metrics": {metric.name: metric.better for metric in task.metrics},
        "primary": task.primary.name,
        "generation": dict(task.generation),
    }


def _shown(value: Any) -> str:
    if value is None:
        return "known once a run has read them"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item!r}" if "\n" in str(item) else f"{key}: {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
