"""
chair: describe a COCO photograph in detail; CHAIR_s, CHAIR_i, recall and length.

Rohrbach, Hendricks et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156. Read from the
hub (500 images), or from a folder with images and annotations. Papers draw different 500 images: ``data.ids`` names a
list, and every run stores the ids it asked. The recipe's ``max_new_tokens`` decides between long (512) and short (64)
captions; for the short ones the parser ``chair-builtin-whole-sentences`` drops a last sentence that was cut off, as
OPERA does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.metrics import chair, coco
from lmmhooks_eval.recipe import DataPlan
from lmmhooks_eval.task import Doc, Parsed, Source, Task
from lmmhooks_eval.tasks import sources

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TASK"]

_NAME = "chair"
_HUB = ("tsunghanwu/mscoco_chair",)
_COLUMNS = ("question_id", "gt_object", "image")
_FILES = ("synonyms", "objects", "instances", "captions")

# The list belongs to the released scorer (BSD-2-Clause); without a folder that has it, it is fetched from there.
_SYNONYMS_URL = "https://raw.githubusercontent.com/LisaAnne/Hallucination/6e4d33c4bedf6dfcd24c61bf527f40714717be47/data/synonyms.txt"
_SYNONYMS_SHA256 = "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2"

_PROMPTS = {
    # OPERA, MemVR, lmms-eval and most others.
    "detail": "Please describe this image in detail.",
    # PAI and what was built on it: VISTA, heads-guided.
    "pai": "Please help me describe the image in detail.",
    # DAMRO.
    "short": "Generate a short caption of this image.",
}


class _Words:
    """The vocabulary, built when the first caption is read."""

    def __init__(self, data: DataPlan) -> None:
        self.data = data

    @cached_property
    def vocabulary(self) -> chair.Vocabulary:
        path = self._path()
        try:
            return coco.vocabulary(coco.read_synonyms(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise TaskError(f"task {_NAME!r}: the synonym list {path} cannot be read: {error}") from error

    def _path(self) -> Path:
        if self.data.folder is not None:
            return sources.find_file(_NAME, self.data.folder, [self.data.files.get("synonyms", "synonyms.txt")])
        return sources.fetch(_SYNONYMS_URL, _SYNONYMS_SHA256, "chair-synonyms.txt")

    def parse(self, text: str, doc: Doc) -> Parsed:
        mentions = self.vocabulary.mentions(text)
        value = {"objects": [mention.node for mention in mentions], "length": len(self.vocabulary.words(text))}
        return Parsed(value, clean=bool(mentions))

    def parse_whole_sentences(self, text: str, doc: Doc) -> Parsed:
        return self.parse(text[: text.rfind(".") + 1], doc)


class _Hub:
    """Documents of the hub dataset, whose ground truth was built with the WordNet variant."""

    def __init__(self, data: DataPlan) -> None:
        ids = _HUB if data.hub is None else (data.hub,)
        self.dataset = sources.HubDataset(_NAME, ids, None, _COLUMNS, data.revision)

    @cached_property
    def docs(self) -> Sequence[Doc]:
        docs = [
            {"id": str(row["question_id"]), "objects": sorted(set(row["gt_object"])), "row": index}
            for index, row in enumerate(self.dataset.rows("test"))
        ]
        return sources.refuse_repeated_ids(_NAME, docs)

    def images(self, doc: Doc) -> Sequence[Image]:
        return [self.dataset.image("test", doc["row"])]

    def source(self) -> Source:
        return sources.hub_source(self.dataset)


class _Folder:
    """Images of a folder, with ground truth from COCO's annotations or from a list of objects per image."""

    def __init__(self, data: DataPlan, words: _Words) -> None:
        self.folder, self.files, self.words = str(data.folder), dict(data.files), words
        unknown = [name for name in self.files if name not in _FILES]
        if unknown:
            raise TaskError(f"task {_NAME!r}: data.files names {unknown[0]!r}, but its files are {', '.join(_FILES)}")

    @cached_property
    def docs(self) -> Sequence[Doc]:
        truth, docs = self._truth(), []
        for image in sorted(self.pictures, key=int):
            if image not in truth:
                raise TaskError(
                    f"task {_NAME!r}: {self.pictures[image]} has no ground truth; remove it, or annotate it"
                )
            docs.append({"id": image, "objects": truth[image]})
        if not docs:
            raise TaskError(
                f"task {_NAME!r}: folder {self.folder}, its images/ and its val2014/ hold no image whose name ends in "
                f"a COCO id, such as COCO_val2014_000000000042.jpg"
            )
        return docs

    @cached_property
    def pictures(self) -> Mapping[str, Path]:
        """Images by COCO id, which ends the file name."""
        found = {}
        for name, path in sources.image_files(self.folder).items():
            if (number := re.search(r"(\d+)$", Path(name).stem)) is not None:
                found[str(int(number[1]))] = path
        return found

    def _truth(self) -> Mapping[str, Sequence[str]]:
        objects = self.files.get("objects", "coco2014_objects.json")
        if "instances" not in self.files and any(
            (Path(self.folder) / name).is_file() for name in (objects, f"{objects}.gz")
        ):
            return self._listed(sources.find_file(_NAME, self.folder, [objects]))
        parts = [
            sources.read_json(
                _NAME, sources.find_file(_NAME, self.folder, [self.files.get(what, f"annotations/{what}_val2014.json")])
            )
            for what in ("instances", "captions")
        ]
        try:
            return coco.objects_from_annotations(parts[0], parts[1], self.words.vocabulary)
        except (KeyError, TypeError) as error:
            raise TaskError(f"task {_NAME!r}: the COCO annotations in {self.folder} lack {error}") from error

    def _listed(self, path: Path) -> Mapping[str, Sequence[str]]:
        """``{"categories": [names], "objects": {image id: [indices of categories]}}``."""
        data = sources.read_json(_NAME, path)
        try:
            names = data["categories"]
            return {str(image): sorted(names[index] for index in found) for image, found in data["objects"].items()}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise TaskError(
                f"task {_NAME!r}: {path} is no list of objects ({error}); it must hold categories (names) and objects "
                f"(image id to indices of categories)"
            ) from error

    def images(self, doc: Doc) -> Sequence[Image]:
        from PIL import Image

        if doc["id"] not in self.pictures:
            raise TaskError(f"no image with the COCO id {doc['id']} in {self.folder}, its images/ or its val2014/")
        return [Image.open(self.pictures[doc["id"]])]

    def source(self) -> Source:
        return Source("local", self.folder, sources.revision_of(self.docs))


def _score(answer: Any, doc: Doc) -> Mapping[str, float]:
    return chair.score(answer["objects"], doc["objects"], answer["length"])


def _at(data: DataPlan) -> Task:
    words = _Words(data)
    parsers: dict[str, Callable[[str, Doc], Parsed]] = {
        "chair-builtin": words.parse,
        "chair-builtin-whole-sentences": words.parse_whole_sentences,
    }
    origin = _Hub(data) if data.folder is None else _Folder(data, words)
    return Task(
        name=_NAME,
        title="Captions of COCO photographs, objects named that are not there (CHAIR)",
        licence="CC BY 4.0 (annotations); COCO terms of use (images)",
        source=origin.source,
        load=lambda: origin.docs,
        images=origin.images,
        prompts=_PROMPTS,
        parsers=parsers,
        score=_score,
        aggregate=chair.aggregate,
        metrics=chair.METRICS,
        item_score="hallucinated",
        item_better="lower",
        generation={"max_new_tokens": 512, "do_sample": False},
        at=_at,
    )


TASK = _at(DataPlan())
