"""The frozen held-out scenes that the bundled tasks ask about: reading their files and opening their images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.task import Doc, Region, Source

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LICENCE", "calibration", "image_cluster", "images", "read", "region", "source", "target", "vocabulary"]

LICENCE = "Apache-2.0 (generated scenes)"


def _folder() -> Path:
    # The path, not the package: `lmmhooks_eval.tiny` imports torch, which scoring and listing must not need.
    return Path(str(files("lmmhooks_eval") / "tiny" / "data"))


def _text(name: str) -> str:
    path = _folder() / name
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TaskError(f"bundled data file {name} cannot be read ({error.strerror}); reinstall lmmhooks") from error


def read(name: str) -> Sequence[Doc]:
    """The documents of one JSON-lines file, in file order."""
    return [json.loads(line) for line in _text(name).splitlines() if line]


@cache
def vocabulary() -> Mapping[str, Any]:
    """Categories with their plurals and synonyms, themes and colours."""
    result: Mapping[str, Any] = json.loads(_text("vocab.json"))
    return result


def source(name: str) -> Source:
    """Bundled source whose revision is a digest of the file."""
    return Source("bundled", name, hashlib.sha256(_text(name).encode()).hexdigest()[:16])


def calibration(name: str) -> Sequence[Doc]:
    """Documents like those of `read`, about scenes that are neither in the benchmark nor in the training data."""
    from lmmhooks_eval.tiny.calibration import documents  # draws scenes, which needs torch

    return documents(name.removesuffix(".jsonl"))


def images(doc: Doc) -> Sequence[Image]:
    """The one image of a scene document: opened lazily, or drawn if the scene is one for calibration."""
    from PIL import Image

    if doc["image"].startswith("calibration/"):
        from lmmhooks_eval.tiny.calibration import draw

        return [draw(doc["image"])]
    return [Image.open(_folder() / doc["image"])]


def image_cluster(doc: Doc) -> str:
    """Documents of one image are dependent: it is their cluster."""
    return str(doc["image"])


@cache
def _objects() -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Objects of every benchmark scene by the name of its image."""
    return {scene["image"]: scene["objects"] for scene in read("scenes.jsonl")}


def region(doc: Doc) -> Region:
    """
    Box of the first object of a document's ``category``, or of another where there is none.

    Raises
    ------
    TaskError
        The scene is none of the benchmark's.
    """
    if doc["image"] not in _objects():
        raise TaskError(f"where the objects of {doc['image']} are is not stored; ask about scenes of the benchmark")
    objects = _objects()[doc["image"]]
    chosen = next((item for item in objects if item["category"] == doc["category"]), objects[0])
    left, top, right, bottom = chosen["box"]
    return left, top, right, bottom


def target(doc: Doc) -> Region | None:
    """Box of the only object of a document's ``category``; None if there is none, or several."""
    found = [item for item in _objects().get(doc["image"], ()) if item["category"] == doc["category"]]
    return region(doc) if len(found) == 1 else None
