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
    return chair.Vocabulary(_synonyms(scenes.vocabulary()["categories"]))


def _synonyms(categories: Any) -> dict[str, list[str]]:
    """Every surface form of a category: its plural is listed too, so irregular ones need no rule."""
    return {name: [*entry.get("synonyms", ()), entry["plural"]] for name, entry in categories.items()}


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
