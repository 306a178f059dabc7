"""
scenes-caption: describe the scene; CHAIR_s, CHAIR_i, recall and length with exact ground truth.

CHAIR as in arXiv 1809.02156, section 3, over the scenes' own vocabulary. The ground truth is every category in the
scene, so no annotation can be incomplete. Recall and length stand beside CHAIR because shorter captions hallucinate
less for free.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from lmmhooks_eval.metrics import chair
from lmmhooks_eval.task import Doc, Parsed, Task
from lmmhooks_eval.tasks import scenes

__all__ = ["TASK"]

_FILE = "scenes_caption.jsonl"


@cache
def _vocabulary() -> chair.Vocabulary:
    # The plural is listed as a synonym, so irregular ones need no rule; names of several words are joined as pairs.
    synonyms = {entry["name"]: [*entry["synonyms"], entry["plural"]] for entry in scenes.vocabulary()["categories"]}
    pairs = {word: word for words in synonyms.values() for word in words if " " in word}
    return chair.Vocabulary(synonyms, pairs)


def _parse(text: str, doc: Doc) -> Parsed:
    mentions = _vocabulary().mentions(text)
    value = {"objects": [mention.node for mention in mentions], "length": len(_vocabulary().words(text))}
    return Parsed(value, clean=bool(mentions))


def _score(answer: Any, doc: Doc) -> Mapping[str, float]:
    return chair.score(answer["objects"], doc["objects"], answer["length"])


TASK = Task(
    name="scenes-caption",
    title="Captions of bundled scenes, objects named that are not there (CHAIR)",
    licence=scenes.LICENCE,
    source=lambda: scenes.source(_FILE),
    load=lambda: scenes.read(_FILE),
    images=scenes.images,
    calibration=lambda: scenes.calibration(_FILE),
    prompts={"bare": "{prompt}"},
    parsers={"chair-builtin": _parse},
    score=_score,
    aggregate=chair.aggregate,
    metrics=chair.METRICS,
    item_score="hallucinated",
    item_better="lower",
    generation={"max_new_tokens": 48, "do_sample": False},
    cluster=scenes.image_cluster,
)
