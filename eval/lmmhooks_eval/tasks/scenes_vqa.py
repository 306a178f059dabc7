"""scenes-vqa: short-answer questions about the bundled scenes, exact match over all and per question type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmmhooks_eval.metrics import exact
from lmmhooks_eval.metrics.ratio import ratio
from lmmhooks_eval.task import Doc, Metric, Parsed, Task, Totals
from lmmhooks_eval.tasks import scenes

__all__ = ["TASK"]

_FILE = "scenes_vqa.jsonl"
_TYPES = ("existence", "colour", "attribute", "count", "side")


def _with_choices(docs: Sequence[Doc]) -> Sequence[Doc]:
    """Every document with the closed set of answers of its type, which is what tells an answer from a refusal."""
    choices: dict[str, set[str]] = {}
    for doc in docs:
        choices.setdefault(doc["type"], set()).add(exact.normalise(doc["answer"]))
    return [{**doc, "choices": sorted(choices[doc["type"]])} for doc in docs]


def _parse(text: str, doc: Doc) -> Parsed:
    answer = exact.normalise(text)
    return Parsed(answer, clean=answer in doc["choices"])


def _score(answer: Any, doc: Doc) -> Mapping[str, float]:
    correct = float(answer == exact.normalise(doc["answer"]))
    return {"correct": correct, "n": 1.0, f"{doc['type']}/correct": correct, f"{doc['type']}/n": 1.0}


def _aggregate(totals: Totals) -> Mapping[str, np.ndarray]:
    zero = np.zeros(np.shape(totals["n"]))
    by_type = {
        f"{kind}/accuracy": ratio(totals.get(f"{kind}/correct", zero), totals[f"{kind}/n"])
        for kind in _TYPES
        if f"{kind}/n" in totals
    }
    return {"accuracy": ratio(totals["correct"], totals["n"]), **by_type}


TASK = Task(
    name="scenes-vqa",
    title="Short-answer questions on bundled scenes (existence, colour, attribute, count)",
    licence=scenes.LICENCE,
    source=lambda: scenes.source(_FILE),
    load=lambda: _with_choices(scenes.read(_FILE)),
    images=scenes.images,
    calibration=lambda: _with_choices(scenes.calibration(_FILE)),
    prompts={"bare": "{question}", "llava": "{question}\nAnswer the question using a single word or phrase."},
    parsers={"exact": _parse},
    score=_score,
    aggregate=_aggregate,
    metrics=(
        Metric("accuracy", proportion=("correct", "n")),
        *(Metric(f"{kind}/accuracy", proportion=(f"{kind}/correct", f"{kind}/n")) for kind in _TYPES),
    ),
    item_score="correct",
    generation={"max_new_tokens": 6, "do_sample": False},
    cluster=scenes.image_cluster,
    stratum=lambda doc: str(doc["type"]),
)
