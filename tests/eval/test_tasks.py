"""The registry, and what every bundled task promises."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

from lmmhooks_eval import tasks
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import discover, get_task

BUNDLED = ("scenes-pope", "scenes-vqa", "scenes-caption", "scenes-small")
SIDES = {"scenes-small": 336}


@pytest.fixture(params=BUNDLED)
def task(request: pytest.FixtureRequest) -> Task:
    return get_task(request.param)


def test_documents_have_unique_ids_and_images_that_open(task: Task) -> None:
    docs = task.load()
    assert len({doc["id"] for doc in docs}) == len(docs) > 100
    for doc in docs[:: len(docs) // 5]:
        (image,) = task.images(doc)
        image.load()
        assert image.size == (SIDES.get(task.name, 112),) * 2
        assert task.cluster(doc) == doc["image"]


def test_messages_hold_the_image_and_the_question(task: Task) -> None:
    doc = task.load()[0]
    (message,) = task.messages(doc)
    assert message["content"][0] == {"type": "image"}
    assert message["content"][1]["text"] == doc.get("question", doc.get("prompt"))
    assert [part["role"] for part in task.messages(doc, system="Be brief.")] == ["system", "user"]


def test_the_right_answer_scores_full_marks(task: Task) -> None:
    def right(doc: Any) -> str:
        if "objects" in doc:
            return f"The image shows {', '.join(doc['objects'])}."
        return str(doc.get("label") or doc["answer"])

    scores = []
    for doc in task.load():
        parsed = task.parse(right(doc), doc)
        assert parsed.clean
        scores.append(task.score(parsed.value, doc))
    names = {name for score in scores for name in score}
    totals = {name: np.asarray(sum(score.get(name, 0.0) for score in scores)) for name in names}
    figures = task.aggregate(totals)
    assert {metric.name for metric in task.metrics} >= figures.keys()
    for metric in task.metrics:
        if metric.better != "neither" and metric.name in figures:
            assert float(figures[metric.name]) == (1.0 if metric.better == "higher" else 0.0), metric.name


def test_metrics_are_elementwise(task: Task) -> None:
    docs = task.load()[:40]
    scores = [task.score(task.parse("No, two red cups.", doc).value, doc) for doc in docs]
    names = sorted({name for score in scores for name in score})
    table = np.array([[score.get(name, 0.0) for score in scores] for name in names])
    halves = np.stack([table[:, :20].sum(1), table[:, 20:].sum(1)], axis=1)
    together = task.aggregate(dict(zip(names, halves, strict=True)))
    for column in (0, 1):
        alone = task.aggregate(dict(zip(names, halves[:, column], strict=True)))
        assert {name: float(value[column]) for name, value in together.items()} == {
            name: float(value) for name, value in alone.items()
        }


def test_source_is_pinned(task: Task) -> None:
    source = task.source()
    assert source.kind == "bundled"
    assert source.revision
    assert len(source.revision) == 16


def test_pope_is_balanced_per_split() -> None:
    docs = get_task("scenes-pope").load()
    for split in ("random", "popular", "adversarial"):
        labels = [doc["label"] for doc in docs if doc["split"] == split]
        assert labels.count("yes") == labels.count("no") > 0


def test_vqa_flags_what_is_no_answer_of_its_type() -> None:
    task = get_task("scenes-vqa")
    count = next(doc for doc in task.load() if doc["type"] == "count")
    assert task.parse("Two.", count).value == "2"
    assert not task.parse("red", count).clean


def test_captions_know_plurals_synonyms_and_pairs() -> None:
    task = get_task("scenes-caption")
    doc = task.load()[0]
    found = task.parse("Two buses, some dishes and a frying pan.", doc).value["objects"]
    assert found == ["bus", "bowl", "pan"]
    assert not task.parse("", doc).clean


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"unknown task 'scenes-poope'; did you mean 'scenes-pope'\?"):
        get_task("scenes-poope")
    with pytest.raises(TaskError, match="no prompt 'lava'; did you mean 'llava'"):
        get_task("scenes-pope").check(prompt="lava")
    with pytest.raises(TaskError, match="no parser 'offical'; did you mean 'official'"):
        get_task("scenes-pope").check(parser="offical")


def test_entry_points_are_found_and_failing_ones_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("broken", "lmmhooks_eval.no_such_module:TASK", tasks.GROUP),
        EntryPoint("number", "math:pi", tasks.GROUP),
        EntryPoint("scenes-pope", "lmmhooks_eval.tasks.scenes_vqa:TASK", tasks.GROUP),
    ]
    monkeypatch.setattr(tasks, "entry_points", lambda group: points)
    found = discover()
    assert set(found.tasks) == {*BUNDLED, "pope", "chair"}
    assert [line.split(":")[0] for line in found.failures] == [
        "entry point 'broken' (lmmhooks_eval.no_such_module",
        "entry point 'number' (math",
        "entry point 'scenes-pope' (lmmhooks_eval.tasks.scenes_vqa",
    ]
    with pytest.raises(TaskError, match="failed to import: entry point 'broken'"):
        get_task("nothing-like-it")


def test_a_third_partys_task_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.eval import plugin

    point = EntryPoint("made-up", "tests.eval.plugin:TASK", tasks.GROUP)
    monkeypatch.setattr(tasks, "entry_points", lambda group: [point])
    assert get_task("made-up") is plugin.TASK
