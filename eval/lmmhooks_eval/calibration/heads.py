"""Head search (`act`): every head edited alone, those kept with which a task is answered better."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.calibration.documents import asked
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.identity import digest
from lmmhooks_eval.plan import Item, batches
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import get_task

if TYPE_CHECKING:
    from lmmhooks.methods.base import Method

__all__ = ["HeadSearch", "Journal"]

MAX_UNPARSED = 0.5
"""Share of first tokens without an answer from which on a task is refused."""


@dataclass(frozen=True)
class HeadSearch:
    """
    Score a task by the first token of every answer, without edit and with every head edited alone.

    Parameters
    ----------
    task
        A task with one-token answers: yes and no, multiple choice.
    limit
        About this many documents. Released script of ACT: up to 900.
    margin
        A head is kept when its score exceeds the unedited one by more than this, in [0, 1). UNVERIFIED: the released
        lists do not say by which rule heads were accepted.
    batch_size
        Prompts per forward.
    seed
        Of the choice of documents.
    """

    task: str = "scenes-pope"
    limit: int = 900
    margin: float = 0.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise TaskError(f"margin={self.margin} is not allowed; it must be in [0, 1)")
        for name in ("limit", "batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1")
        get_task(self.task)

    def measure(
        self, method: Method, generator: Generator, journal: Path, progress: RunProgress
    ) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """``{layer: heads}`` and the score with each head; continues where an earlier search of the kind stopped."""
        import lmmhooks
        from lmmhooks.family import resolve
        from lmmhooks.loading import identity

        family = resolve(generator.model)
        task = get_task(self.task)
        items, is_benchmark = asked(task, generator.processor, self.limit, self.seed)
        one_by_one = {
            (layer, head): replace(method, heads={layer: [head]})  # type: ignore[call-arg] # methods with this field
            for layer in replace(method, heads="all").layers(family)  # type: ignore[call-arg, attr-defined]
            for head in range(family.num_heads)
        }
        search = {
            **asdict(self),
            "method": method.settings(),
            "checkpoint": identity(generator.model),
            "documents": digest([[item.doc_id, item.prompt, item.image] for item in items]),
        }
        exam = _Exam(task, items, generator, self.batch_size)
        scores = Journal(journal, search)
        with progress:
            progress.begin(len(items) * (1 + len(one_by_one) - len(scores)))
            progress.enter(task.name, "no edit")
            baseline, unparsed = exam.score(progress)
            if unparsed > MAX_UNPARSED:
                raise TaskError(
                    f"{unparsed:.0%} of the answers to {task.name!r} cannot be read from their first token; "
                    "search heads on a task with one-token answers, such as scenes-pope"
                )
            progress.leave(task.name, "no edit", f"{baseline:.4f}")
            for (layer, head), alone in one_by_one.items():
                if (layer, head) in scores:
                    continue
                progress.enter(task.name, f"layer {layer}, head {head}")
                with lmmhooks.wrap(generator.model, alone, processor=generator.processor):
                    scores.add(layer, head, exam.score(progress)[0])
            kept = _kept(scores, list(one_by_one), baseline + self.margin)
            table = [[layer, head, round(scores[layer, head], 6)] for layer, head in one_by_one]
        num_kept = sum(map(len, kept.values()))
        return kept, {
            "summary": f"{num_kept} of {len(one_by_one)} heads, edited alone, answer more than {baseline:.4f} of "
            f"{len(items)} documents of {task.name} correctly (margin {self.margin:g})",
            "instead": "heads={2: [0]}, or calibrate on more documents",
            "unedited": baseline,
            "unparsed": unparsed,
            "scores": table,
            "num_documents": len(items),
            "documents": [item.doc_id for item in items],
            "documents_are_benchmark": is_benchmark,
        }


def _kept(scores: Journal, heads: Sequence[tuple[int, int]], least: float) -> dict[str, list[int]]:
    """Heads by layer that score more than ``least``; layers are texts, as JSON has them."""
    kept: dict[str, list[int]] = {}
    for layer, head in heads:
        if scores[layer, head] > least:
            kept.setdefault(str(layer), []).append(head)
    return kept


class Journal:
    """
    Scores found so far, one line each behind a line that says which search they belong to.

    A file of another search is replaced.

    Parameters
    ----------
    path
        Of the file.
    search
        JSON data; everything the scores depend on.
    """

    def __init__(self, path: Path, search: Mapping[str, Any]) -> None:
        self._path = path
        header = json.dumps(search, sort_keys=True)
        self._scores: dict[tuple[int, int], float] = {}
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        if lines and lines[0] == header:
            for line in lines[1:]:
                # The last line is torn if the search was killed while it was written.
                with suppress(ValueError):
                    layer, head, score = json.loads(line)
                    self._scores[layer, head] = score
        kept = [json.dumps([*key, score]) for key, score in self._scores.items()]
        self._path.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")

    def add(self, layer: int, head: int, score: float) -> None:
        """Keep a score, on disk at once."""
        self._scores[layer, head] = score
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([layer, head, score]) + "\n")

    def __getitem__(self, key: tuple[int, int]) -> float:
        return self._scores[key]

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._scores

    def __len__(self) -> int:
        return len(self._scores)


class _Exam:
    """Documents that are asked again and again: their inputs are made once."""

    def __init__(self, task: Task, items: Sequence[Item], generator: Generator, batch_size: int) -> None:
        self.task = task
        self.generator = generator
        self.batches = [
            (batch, generator.inputs([item.prompt for item in batch], [task.images(item.doc) for item in batch]))
            for batch in batches(items, batch_size)
        ]

    def score(self, progress: RunProgress) -> tuple[float, float]:
        """Mean of the task's item score, 1 being best, and the share of answers that could not be read."""
        points, unread, number = 0.0, 0, 0
        for items, inputs in self.batches:
            texts = self.generator.first_tokens(inputs)
            for item, text in zip(items, texts, strict=True):
                parsed = self.task.parse(text, item.doc)
                value = self.task.score(parsed.value, item.doc)[self.task.item_score]
                points += value if self.task.item_better == "higher" else 1 - value
                unread += not parsed.clean
            number += len(items)
            progress.advance(len(items), f"{points / number:.4f}")
        return points / number, unread / number
