"""What a measurement looks at: documents of a task, and demonstrations with a true and an invented answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.plan import Item, prepare, select
from lmmhooks_eval.task import Doc, Task

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Demo", "asked", "demos_from_file", "demos_from_task", "documents"]

_FIELDS = ("image", "question", "value", "h_value")


@dataclass(frozen=True)
class Demo:
    """
    A question about images with two answers.

    Parameters
    ----------
    id
        Seeds what is random about it, so that the order of demonstrations does not matter.
    images
        PIL images.
    prompt
        Rendered with the chat template, ready for the answer.
    value, h_value
        A true answer, and one with invented objects.
    """

    id: str
    images: Sequence[Image]
    prompt: str
    value: str
    h_value: str


def documents(task: Task) -> tuple[Sequence[Doc], bool]:
    """A task's documents for calibration, or those of the benchmark if it has none; and whether they are the latter."""
    return (task.load(), True) if task.calibration is None else (task.calibration(), False)


def asked(task: Task, processor: Any, limit: int | None, seed: int) -> tuple[list[Item], bool]:
    """
    Documents of a task for calibration, ready to be asked, and whether they are part of the benchmark.

    Raises
    ------
    TaskError
        One of them cannot be asked.
    """
    docs, is_benchmark = documents(task)
    items = [prepare(task, doc, processor) for doc in select(task, docs, limit, seed)]
    if problem := next((item.error for item in items if item.error), None):
        raise TaskError(problem)
    return items, is_benchmark


def demos_from_task(task: Task, processor: Any, limit: int | None, seed: int) -> tuple[list[Demo], bool]:
    """
    Demonstrations that a task's documents hold, and whether they are part of the benchmark.

    Raises
    ------
    TaskError
        They hold none, or one of them cannot be asked.
    """
    docs, is_benchmark = documents(task)
    docs = [doc for doc in docs if "value" in doc and "h_value" in doc]
    if not docs:
        raise TaskError(
            f"task {task.name!r} has no demonstrations: its documents carry no 'value' and 'h_value'; use "
            f"--task scenes-caption, or --demos FILE with lines of {', '.join(_FIELDS)}"
        )
    demos = []
    for doc in select(task, docs, limit, seed):
        item = prepare(task, doc, processor)
        if item.error is not None:
            raise TaskError(item.error)
        demos.append(Demo(item.doc_id, task.images(doc), item.prompt, str(doc["value"]), str(doc["h_value"])))
    return demos, is_benchmark


def demos_from_file(path: Path, processor: Any, limit: int | None) -> list[Demo]:
    """
    Demonstrations from a JSON-lines file; images are paths relative to its folder.

    Raises
    ------
    TaskError
        The file cannot be read, or a line lacks a field or names an image that does not open; names the line.
    """
    from lmmhooks.errors import PromptError
    from lmmhooks.prompting import open_image

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"demonstrations {path} cannot be read ({error}); give a JSON-lines file") from None
    demos: list[Demo] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (limit is not None and len(demos) == limit):
            continue
        try:
            row = json.loads(line)
            name, question, value, h_value = (str(row[field]) for field in _FIELDS)
            image = open_image(path.parent / name)
        except (ValueError, KeyError, TypeError, PromptError) as error:
            reason = str(error) if isinstance(error, PromptError) else f"needs {', '.join(_FIELDS)}"
            raise TaskError(f"{path}, line {number}: {reason}") from None
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        demos.append(Demo(f"{number}", [image], prompt, value, h_value))
    return demos
