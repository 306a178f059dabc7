"""Closed questions with short answers: exact match over all documents and per group of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmmhooks_eval.metrics import exact
from lmmhooks_eval.metrics.ratio import ratio
from lmmhooks_eval.task import Doc, Metric, Parsed, Totals

__all__ = ["aggregate", "metrics", "parse", "score", "with_choices"]


def with_choices(docs: Sequence[Doc]) -> Sequence[Doc]:
    """Every document with the closed set of answers of its ``type``, which is what tells an answer from a refusal."""
    choices: dict[str, set[str]] = {}
    for doc in docs:
        choices.setdefault(doc["type"], set()).add(exact.normalise(doc["answer"]))
    return [{**doc, "choices": sorted(choices[doc["type"]])} for doc in docs]


def parse(text: str, doc: Doc) -> Parsed:
    """The normalised answer; clean if it is one that a question of this type can have."""
    answer = exact.normalise(text)
    return Parsed(answer, clean=answer in doc["choices"])


def score(answer: Any, doc: Doc, fields: Sequence[str]) -> Mapping[str, float]:
    """Counts over all documents, and over the groups that the document's ``fields`` name."""
    correct = float(answer == exact.normalise(doc["answer"]))
    groups = ["", *(f"{doc[field]}/" for field in fields)]
    return {f"{group}{name}": value for group in groups for name, value in (("correct", correct), ("n", 1.0))}


def aggregate(totals: Totals, groups: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Accuracy of all, and of the groups that have documents."""
    zero = np.zeros(np.shape(totals["n"]))
    by_group = {
        f"{group}/accuracy": ratio(totals.get(f"{group}/correct", zero), totals[f"{group}/n"])
        for group in groups
        if f"{group}/n" in totals
    }
    return {"accuracy": ratio(totals["correct"], totals["n"]), **by_group}


def metrics(groups: Sequence[str]) -> tuple[Metric, ...]:
    """What `aggregate` returns, described."""
    return (
        Metric("accuracy", proportion=("correct", "n")),
        *(Metric(f"{group}/accuracy", proportion=(f"{group}/correct", f"{group}/n")) for group in groups),
    )
