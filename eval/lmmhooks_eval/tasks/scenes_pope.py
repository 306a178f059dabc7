"""
scenes-pope: is there an object of this category in the scene, with random, popular and in-theme (adversarial)
negatives.

POPE's protocol (arXiv 2305.10355) on the bundled scenes: per image and split equally many yes and no, the official
parser, metrics per split and their means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmmhooks_eval.metrics import yesno
from lmmhooks_eval.task import Doc, Task, Totals
from lmmhooks_eval.tasks import scenes

__all__ = ["TASK"]

_FILE = "scenes_pope.jsonl"
_SPLITS = ("random", "popular", "adversarial")


def _score(verdict: Any, doc: Doc) -> Mapping[str, float]:
    return yesno.score(verdict, doc["label"], doc["split"])


def _aggregate(totals: Totals) -> Mapping[str, np.ndarray]:
    return yesno.aggregate(totals, _SPLITS)


TASK = Task(
    name="scenes-pope",
    title="Object existence on bundled scenes (random, popular, adversarial negatives)",
    licence=scenes.LICENCE,
    source=lambda: scenes.source(_FILE),
    load=lambda: scenes.read(_FILE),
    images=scenes.images,
    calibration=lambda: scenes.calibration(_FILE),
    # The bundled models were trained on the bare question; the suffix is LLaVA's official POPE prompt, for other
    # models.
    prompts={"bare": "{question}", "llava": "{question}\nAnswer the question using a single word or phrase."},
    parsers=yesno.PARSERS,
    score=_score,
    aggregate=_aggregate,
    metrics=yesno.metrics(_SPLITS),
    item_score="correct",
    generation={"max_new_tokens": 4, "do_sample": False},
    cluster=scenes.image_cluster,
    stratum=lambda doc: f"{doc['split']}/{doc['label']}",
)
