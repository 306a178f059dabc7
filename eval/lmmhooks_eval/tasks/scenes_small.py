"""
scenes-small: short-answer questions about objects of 6 to 40 pixels on a canvas of 336 x 336, by size of the object.

What methods that look again are for: the bundled models see the canvas at a third of its side, and a crop around the
object at its own resolution. Every document has the exact box of what it asks about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from lmmhooks_eval.task import Doc, Region, Source, Task
from lmmhooks_eval.tasks import scenes, short_answer

if TYPE_CHECKING:
    from PIL.Image import Image

    from lmmhooks_eval.tiny.small import SmallScene

__all__ = ["SIZES", "TASK", "TYPES"]

_FILE, _SCENES = "scenes_small.jsonl", "small_scenes.jsonl"
TYPES = ("existence", "attribute", "colour", "count")
SIZES = ("tiny", "small", "medium", "large")
_GROUPS = (*SIZES, *TYPES)


@cache
def _scenes() -> Mapping[str, SmallScene]:
    from lmmhooks_eval.tiny.small import SmallScene

    return {row["image"]: SmallScene.from_dict(row) for row in map(dict, scenes.read(_SCENES))}


def _images(doc: Doc) -> Sequence[Image]:
    from PIL import Image

    from lmmhooks_eval.tiny.small import draw

    name = doc["image"]
    if name.startswith("calibration-small/"):
        from lmmhooks_eval.tiny.calibration import small_scene

        return [Image.fromarray(draw(small_scene(name)))]
    return [Image.fromarray(draw(_scenes()[name]))]


def _source() -> Source:
    """Documents and scenes; pixels are a function of the scenes."""
    both = "".join(str(scenes.source(name).revision) for name in (_FILE, _SCENES))
    return Source("bundled", _FILE, hashlib.sha256(both.encode()).hexdigest()[:16])


def _region(doc: Doc) -> Region:
    left, top, right, bottom = doc["region"]
    return left, top, right, bottom


TASK = Task(
    name="scenes-small",
    title="Short-answer questions on small objects in large scenes (existence, attribute, colour, count)",
    licence=scenes.LICENCE,
    source=_source,
    load=lambda: short_answer.with_choices(scenes.read(_FILE)),
    images=_images,
    calibration=lambda: short_answer.with_choices(scenes.calibration(_FILE)),
    prompts={"bare": "{question}", "llava": "{question}\nAnswer the question using a single word or phrase."},
    parsers={"exact": short_answer.parse},
    score=partial(short_answer.score, fields=("size", "type")),
    aggregate=partial(short_answer.aggregate, groups=_GROUPS),
    metrics=short_answer.metrics(_GROUPS),
    item_score="correct",
    generation={"max_new_tokens": 6, "do_sample": False},
    cluster=scenes.image_cluster,
    # Not by size as well: nearly every scene would be a mix of its own, and a small sample could keep none.
    stratum=lambda doc: str(doc["type"]),
    region=_region,
    target=lambda doc: _region(doc) if doc["target"] else None,
)
