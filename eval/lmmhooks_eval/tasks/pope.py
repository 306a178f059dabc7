"""
pope: is there an object of this category in the photograph, with random, popular and adversarial negatives (COCO).

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355. Read from
the hub, or from a folder with the official question files and the COCO val2014 images. The current release of the
`random` split has 3,000 questions; LLaVA-1.5 reports on its first one of 2,910, which ``data.files`` can name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.metrics import yesno
from lmmhooks_eval.recipe import DataPlan
from lmmhooks_eval.task import Doc, Source, Task
from lmmhooks_eval.tasks import sources

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TASK"]

_NAME = "pope"
# The repository moved in July 2026; the old id redirects as long as somebody keeps it.
_HUB = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
_COLUMNS = ("question_id", "question", "answer", "image_source", "image")
_FIELDS = ("question_id", "image", "text", "label")

_PROMPTS = {
    # LLaVA's own question file; lmms-eval asks the same.
    "llava": "{question}\nAnswer the question using a single word or phrase.",
    "lmms-eval": "{question}\nAnswer the question using a single word or phrase.",
    # OPERA, PAI, SID, VISTA; VLMEvalKit for models without a prompt of their own.
    "bare": "{question}",
    "vlmevalkit": "{question}",
    "vlmevalkit-qwen": "{question} Please answer yes or no.",
    "vcd": "{question} Please answer this question with one word.",
    "cd-rethink": "{question} Answer the question using a single word or phrase.",
    "vaf": "{question} Please just answer yes or no.",
}


class _Hub:
    """Documents of the hub dataset: one configuration whose splits are POPE's."""

    def __init__(self, data: DataPlan) -> None:
        ids = _HUB if data.hub is None else (data.hub,)
        self.dataset = sources.HubDataset(_NAME, ids, "Full", _COLUMNS, data.revision)

    @cached_property
    def docs(self) -> Sequence[Doc]:
        return _checked(
            [
                _doc(split, row["question_id"], row["question"], row["answer"], row["image_source"]) | {"row": index}
                for split in yesno.POPE_SPLITS
                for index, row in enumerate(self.dataset.rows(split))
            ]
        )

    def images(self, doc: Doc) -> Sequence[Image]:
        return [self.dataset.image(doc["split"], doc["row"])]

    def source(self) -> Source:
        return sources.hub_source(self.dataset)


class _Folder:
    """Documents of the official question files, with images beside them."""

    def __init__(self, data: DataPlan) -> None:
        self.folder, self.files = str(data.folder), dict(data.files)
        unknown = [split for split in self.files if split not in yesno.POPE_SPLITS]
        if unknown:
            raise TaskError(
                f"task {_NAME!r}: data.files names {unknown[0]!r}, but its files are those of the splits "
                f"{', '.join(yesno.POPE_SPLITS)}"
            )

    @cached_property
    def docs(self) -> Sequence[Doc]:
        docs = []
        for split in yesno.POPE_SPLITS:
            names = [self.files[split]] if split in self.files else [f"coco_pope_{split}.json", f"coco_{split}.jsonl"]
            path = sources.find_file(_NAME, self.folder, names)
            for row in sources.read_json_lines(_NAME, path, _FIELDS):
                docs.append(_doc(split, row["question_id"], row["text"], row["label"], row["image"]))
        return _checked(docs)

    @cached_property
    def pictures(self) -> Mapping[str, Path]:
        return sources.image_files(self.folder)

    def images(self, doc: Doc) -> Sequence[Image]:
        from PIL import Image

        if doc["image"] not in self.pictures:
            raise TaskError(f"no image {doc['image']} in {self.folder}, its images/ or its val2014/")
        return [Image.open(self.pictures[doc["image"]])]

    def source(self) -> Source:
        return Source("local", self.folder, sources.revision_of(self.docs))


def _doc(split: str, number: Any, question: str, label: str, image: str) -> dict[str, Any]:
    # Question ids restart in every split, and are numbers in the official files but text on the hub.
    image = image if Path(image).suffix else f"{image}.jpg"
    return {"id": f"{split}/{number}", "split": split, "question": question, "label": label, "image": image}


def _checked(docs: Sequence[Doc]) -> Sequence[Doc]:
    for doc in docs:
        if doc["label"] not in ("yes", "no"):
            raise TaskError(f"task {_NAME!r}: document {doc['id']!r} has the label {doc['label']!r}, not yes or no")
    return sources.refuse_repeated_ids(_NAME, docs)


def _at(data: DataPlan) -> Task:
    origin = _Hub(data) if data.folder is None else _Folder(data)
    return Task(
        name=_NAME,
        title="Object existence on COCO photographs (POPE: random, popular, adversarial negatives)",
        licence="MIT (questions); COCO terms of use (images)",
        source=origin.source,
        load=lambda: origin.docs,
        images=origin.images,
        prompts=_PROMPTS,
        parsers=yesno.PARSERS,
        score=yesno.pope_score,
        aggregate=yesno.pope_aggregate,
        metrics=yesno.metrics(yesno.POPE_SPLITS),
        item_score="correct",
        generation={"max_new_tokens": 128, "do_sample": False},
        cluster=lambda doc: str(doc["image"]),
        stratum=lambda doc: f"{doc['split']}/{doc['label']}",
        answer_words=yesno.WORDS,
        at=_at,
    )


TASK = _at(DataPlan())
