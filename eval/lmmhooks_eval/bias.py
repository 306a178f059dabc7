"""
Yes/no answers apart from what a model leans to: the area under the curve of every variant, and the best fixed offset.

Both come from the margins that are stored with answers (`lmmhooks_eval.evidence`) and need no model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lmmhooks_eval import stats
from lmmhooks_eval.answers import Scored
from lmmhooks_eval.metrics.discrimination import Ranking, best_offset
from lmmhooks_eval.recipe import StatisticsSettings
from lmmhooks_eval.task import AnswerWords, Task

__all__ = ["AUC", "TUNED_OFFSET", "auc_estimates", "offset_answers"]

AUC = "auc"
TUNED_OFFSET = "yes-offset-tuned"
"""Name of the control that adds to every margin of the baseline the number that is best on the other half of images."""


def auc_estimates(
    task: Task, before: Sequence[Scored], after: Sequence[Scored], settings: StatisticsSettings
) -> dict[str, dict[str, Any]]:
    """
    Areas under the curve, in the form of every other metric: per split and their mean (`AUC`).

    Parameters
    ----------
    task
        The task.
    before, after
        Answers of baseline and variant to the same documents.
    settings
        How differences are judged.

    Returns
    -------
    dict
        Empty for tasks without answer words, and where some answer has no margin (an answer put together from several
        generations, a run of an older version). Splits without documents of both kinds are left out.
    """
    words = task.answer_words
    if words is None or any(answer.record.get("margin") is None for answer in (*before, *after)):
        return {}
    names = sorted({answer.record["cluster"] for answer in before})
    place = {name: index for index, name in enumerate(names)}
    rankings = [_rankings(words, answers, place) for answers in (before, after)]
    splits = [split for split, ranking in rankings[0].items() if ranking.defined]
    if not splits:
        return {}

    def figures(by_split: Mapping[str, Ranking], weights: np.ndarray) -> dict[str, np.ndarray]:
        each = {f"{split}/{AUC}": by_split[split].auc(weights) for split in splits}
        return {AUC: np.mean(list(each.values()), axis=0), **each}

    estimates = stats.paired_resampling(
        len(names),
        lambda weights: figures(rankings[0], weights),
        lambda weights: figures(rankings[1], weights),
        settings.draws,
        settings.confidence,
        settings.seed,
    )
    return {name: _as_metric(estimate, len(after)) for name, estimate in estimates.items()}


def _rankings(words: AnswerWords, answers: Sequence[Scored], place: Mapping[str, int]) -> dict[str, Ranking]:
    by_split: dict[str, list[Scored]] = {}
    for answer in answers:
        by_split.setdefault(words.split(answer.record["doc"]), []).append(answer)
    return {
        split: Ranking.of(
            np.asarray([answer.record["margin"] for answer in own], dtype=float),
            np.asarray([words.is_positive(answer.record["doc"]) for answer in own], dtype=bool),
            np.asarray([place[answer.record["cluster"]] for answer in own]),
            len(place),
        )
        for split, own in by_split.items()
    }


def _as_metric(estimate: stats.Estimate, n: int) -> dict[str, Any]:
    given = asdict(estimate)
    given.pop("baseline_interval")
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return {**listed, "n": n, "interval_method": "cluster-bootstrap"}


def offset_answers(
    task: Task, baseline: Mapping[str, Scored], seed: int, parser: str | None = None
) -> tuple[dict[str, Scored], list[float]] | None:
    """
    What the baseline would say with the best fixed offset, tuned on half of the images and used on the other half.

    Parameters
    ----------
    task, baseline
        The task, and the answers of the untouched model.
    seed
        Of the split of the images.
    parser
        As in `Task.parse`.

    Returns
    -------
    tuple or None
        Answers by document, and the two offsets in logits; None for tasks without answer words, without margins or with
        a single image.
    """
    words = task.answer_words
    if words is None or any(answer.record.get("margin") is None for answer in baseline.values()):
        return None
    clusters = sorted({answer.record["cluster"] for answer in baseline.values()})
    if len(clusters) < 2:
        return None
    random.Random(f"{seed}/halves").shuffle(clusters)
    first = set(clusters[: len(clusters) // 2])
    halves = [
        [doc for doc, answer in baseline.items() if (answer.record["cluster"] in first) == side] for side in (1, 0)
    ]
    offsets = []
    for half in halves:
        told = [baseline[doc].record for doc in half]
        offsets.append(best_offset([row["margin"] for row in told], [words.is_positive(row["doc"]) for row in told]))
    answers: dict[str, Scored] = {}
    for half, offset in zip(halves, reversed(offsets), strict=True):
        for doc in half:
            record = baseline[doc].record
            text = words.positive if record["margin"] + offset > 0 else words.negative
            parsed = task.parse(text, record["doc"], parser)
            answers[doc] = Scored(
                {**record, "text": text}, parsed.value, parsed.clean, task.score(parsed.value, record["doc"])
            )
    return {doc: answers[doc] for doc in baseline}, offsets
