"""
The registry of tasks: the bundled ones by name, third parties' through the entry-point group ``lmmhooks.tasks``.

An entry point names a `Task` object. One that cannot be imported, or is no task, is reported by `discover` and in the
error of a look-up that fails: a plug-in that silently vanishes costs its author a day.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from lmmhooks.errors import closest
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.task import Task

__all__ = ["Discovery", "discover", "get_task"]

GROUP = "lmmhooks.tasks"

# Modules rather than objects, so that asking for one task imports one file.
_BUNDLED: Mapping[str, str] = {
    "scenes-pope": "lmmhooks_eval.tasks.scenes_pope",
    "scenes-vqa": "lmmhooks_eval.tasks.scenes_vqa",
    "scenes-caption": "lmmhooks_eval.tasks.scenes_caption",
}


@dataclass(frozen=True)
class Discovery:
    """Every task that can be used, and one line for every entry point that cannot."""

    tasks: Mapping[str, Task]
    failures: tuple[str, ...]


def discover() -> Discovery:
    """Import every bundled and every registered task."""
    tasks = {name: _bundled(name) for name in _BUNDLED}
    failures: list[str] = []
    for point in entry_points(group=GROUP):
        try:
            task = point.load()
        except Exception as error:
            failures.append(f"entry point {point.name!r} ({point.value}): {type(error).__name__}: {error}")
            continue
        if not isinstance(task, Task):
            failures.append(f"entry point {point.name!r} ({point.value}): expected a Task, got {type(task).__name__}")
        elif point.name in tasks or task.name != point.name:
            failures.append(f"entry point {point.name!r} ({point.value}): its task is named {task.name!r}, or taken")
        else:
            tasks[point.name] = task
    return Discovery(tasks, tuple(failures))


def get_task(name: str) -> Task:
    """
    The task of this name.

    Raises
    ------
    TaskError
        If there is none; the message names the closest, all known ones, and every entry point that failed to import.
    """
    if name in _BUNDLED:
        return _bundled(name)
    found = discover()
    if name in found.tasks:
        return found.tasks[name]
    failed = f"; failed to import: {'; '.join(found.failures)}" if found.failures else ""
    raise TaskError(
        f"unknown task {name!r}{closest(name, found.tasks)}; known: {', '.join(sorted(found.tasks))}{failed}"
    )


def _bundled(name: str) -> Task:
    task: Task = importlib.import_module(_BUNDLED[name]).TASK
    return task
