"""
scenes-pope: is there an object of this category in the scene, with random, popular and in-theme (adversarial)
negatives.

POPE's protocol (arXiv 2305.10355) on the bundled scenes: per image and split equally many yes and no, the official
parser, metrics per split and their means.
"""

from __future__ import annotations

from lmmhooks_eval.metrics import yesno
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import scenes

__all__ = ["TASK"]

_FILE = "scenes_pope.jsonl"

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
    score=yesno.pope_score,
    aggregate=yesno.pope_aggregate,
    metrics=yesno.metrics(yesno.POPE_SPLITS),
    item_score="correct",
    generation={"max_new_tokens": 4, "do_sample": False},
    cluster=scenes.image_cluster,
    stratum=lambda doc: f"{doc['split']}/{doc['label']}",
    answer_words=yesno.WORDS,
    region=scenes.region,
    target=scenes.target,
)
