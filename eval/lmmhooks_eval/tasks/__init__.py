"""
The registry of tasks: the bundled ones by name, third parties' through the entry-point group ``lmmhooks.tasks``.

An entry point names a `Task` object. One that cannot be imported, or is no task, is reported by `discover` and in the
error of a look-up that fails: a plug-in that silently vanishes costs its author a day.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path

from lmmhooks.errors import closest
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.recipe import TaskPlan
from lmmhooks_eval.task import Doc, Task

__all__ = ["Discovery", "discover", "get_task", "open_task"]

GROUP = "lmmhooks.tasks"

# Modules rather than objects, so that asking for one task imports one file.
_BUNDLED: Mapping[str, str] = {
    "scenes-pope": "lmmhooks_eval.tasks.scenes_pope",
    "scenes-vqa": "lmmhooks_eval.tasks.scenes_vqa",
    "scenes-caption": "lmmhooks_eval.tasks.scenes_caption",
    "scenes-small": "lmmhooks_eval.tasks.scenes_small",
    "pope": "lmmhooks_eval.tasks.pope",
    "chair": "lmmhooks_eval.tasks.chair",
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


def open_task(plan: TaskPlan) -> Task:
    """
    The task of a recipe's plan, on the data the plan names; nothing is read before its documents are asked for.

    Raises
    ------
    TaskError
        If there is no such task, or it is bundled with its data and the plan names others.
    """
    task, data = get_task(plan.name), plan.data
    if data.model_dump(exclude={"ids"}, exclude_defaults=True):
        if task.at is None:
            raise TaskError(f"task {task.name!r} comes with its data; drop its data.folder, data.hub and data.files")
        task = task.at(data)
    if data.ids is None:
        return task
    listed, whole = Path(data.ids), task.load
    return replace(task, load=lambda: _listed(task.name, whole(), listed))


def _listed(name: str, docs: Sequence[Doc], path: Path) -> Sequence[Doc]:
    """The documents whose ids a file lists, in the order of the file."""
    try:
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"task {name!r}: the list of ids {path} cannot be read: {error}") from error
    by_id = {str(doc["id"]): doc for doc in docs}
    unknown = [doc_id for doc_id in ids if doc_id not in by_id]
    if unknown or not ids or len(set(ids)) < len(ids):
        what = "repeated ids" if ids else "no ids"
        if unknown:
            what = f"{len(unknown)} unknown ids, first {unknown[0]!r}"
        raise TaskError(
            f"task {name!r}: {path} holds {what}; its documents have ids such as {', '.join(list(by_id)[:3])}"
        )
    return [by_id[doc_id] for doc_id in ids]


def _bundled(name: str) -> Task:
    task: Task = importlib.import_module(_BUNDLED[name]).TASK
    return task
