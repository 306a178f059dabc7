"""scenes-vqa: short-answer questions about the bundled scenes, exact match over all and per question type."""

from __future__ import annotations

from functools import partial

from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import scenes, short_answer

__all__ = ["TASK"]

_FILE = "scenes_vqa.jsonl"
_TYPES = ("existence", "colour", "attribute", "count", "side")

TASK = Task(
    name="scenes-vqa",
    title="Short-answer questions on bundled scenes (existence, colour, attribute, count)",
    licence=scenes.LICENCE,
    source=lambda: scenes.source(_FILE),
    load=lambda: short_answer.with_choices(scenes.read(_FILE)),
    images=scenes.images,
    calibration=lambda: short_answer.with_choices(scenes.calibration(_FILE)),
    prompts={"bare": "{question}", "llava": "{question}\nAnswer the question using a single word or phrase."},
    parsers={"exact": short_answer.parse},
    score=partial(short_answer.score, fields=("type",)),
    aggregate=partial(short_answer.aggregate, groups=_TYPES),
    metrics=short_answer.metrics(_TYPES),
    item_score="correct",
    generation={"max_new_tokens": 6, "do_sample": False},
    cluster=scenes.image_cluster,
    stratum=lambda doc: str(doc["type"]),
)
