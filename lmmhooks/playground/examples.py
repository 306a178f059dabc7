"""Bundled scenes to begin with: pictures and questions of the evaluation package, no download."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

__all__ = ["Example", "examples"]

#: One question of each kind the bundled tasks ask, each about another scene: the first of its kind with that ending.
QUESTIONS = ("0004-existence", "0001-colour", "0003-caption")
FILES = ("scenes_vqa.jsonl", "scenes_caption.jsonl")


class Example(NamedTuple):
    """A picture and a question about it."""

    image: Image.Image
    question: str


def examples() -> list[Example]:
    """Three scenes, each with a question: is it there, what colour is it, what is in the picture."""
    from lmmhooks_eval.tasks import scenes

    documents = [document for name in FILES for document in scenes.read(name)]
    found = []
    for start in QUESTIONS:
        document = next(each for each in documents if each["id"].startswith(start))
        with scenes.images(document)[0] as image:
            picture = image.convert("RGB")
        found.append(Example(picture, document.get("question") or document["prompt"]))
    return found
