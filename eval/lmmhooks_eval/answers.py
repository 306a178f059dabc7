"""Stored answers, read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmmhooks_eval.recipe import TaskPlan
from lmmhooks_eval.store import Record
from lmmhooks_eval.task import Task

__all__ = ["Scored", "scored_answers"]


@dataclass(frozen=True)
class Scored:
    """An answer read again: its line, what the parser made of it, and its statistics."""

    record: Record
    value: Any
    clean: bool
    score: Mapping[str, float]


def scored_answers(records: Sequence[Record], plan: TaskPlan, task: Task) -> dict[str, dict[str, Scored]]:
    """
    ``{variant: {document id: Scored}}`` of one task; documents that failed are left out.

    Of several lines about a document the last counts: a failed document that was tried again has two.
    """
    latest: dict[tuple[str, str], Record] = {}
    for record in records:
        if record["task"] == task.name:
            latest[record["variant"], record["doc_id"]] = record
    result: dict[str, dict[str, Scored]] = {}
    for (variant, doc_id), record in latest.items():
        answers = result.setdefault(variant, {})
        if "error" not in record:
            parsed = task.parse(record["text"], record["doc"], plan.parser)
            score = task.score(parsed.value, record["doc"])
            answers[doc_id] = Scored(record, parsed.value, parsed.clean, score)
    return result
