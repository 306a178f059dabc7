"""Maps against boxes: measures by hand, means by loops, the page by rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.geometry import CellGrid, Geometry
from lmmhooks.inspect import attention_map
from lmmhooks.inspect.localisation import localise
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.localisation import CHANCE, MEASURES, chance, measure, question_of, score, summary
from lmmhooks_eval.report.contact_sheet import contact_sheet, shown_documents
from lmmhooks_eval.report.localisation import best_entries, localisation_page
from lmmhooks_eval.tasks import get_task

# Four cells of 50 x 40 pixels and a token that shows no place, as newlines do.
GRID = CellGrid(torch.tensor([[0, 1], [2, 3]]), (0.0, 0.0, 100.0, 80.0), "image")
GEOMETRY = Geometry((100, 80), 5, (GRID,))


def test_a_hit_is_any_part_of_the_box_in_the_strongest_cell() -> None:
    box = (45.0, 35.0, 70.0, 39.0)  # in the upper two cells, the centre of neither
    for strongest, hit in ((0, 1.0), (1, 1.0), (2, 0.0), (3, 0.0)):
        values = torch.zeros(5)
        values[strongest] = 1.0
        values[4] = 9.0
        found = score(GEOMETRY, values, box)
        assert (found.hit, found.pointing) == (hit, 0.0)
    assert score(GEOMETRY, torch.ones(5), box).hit == 0.0


def test_chance_is_what_cells_drawn_at_random_get() -> None:
    for box in ((45.0, 35.0, 70.0, 39.0), (0.0, 0.0, 60.0, 80.0), (26.0, 21.0, 30.0, 30.0)):
        drawn = [score(GEOMETRY, torch.eye(5)[cell], box) for cell in range(4)]
        expected = chance(GEOMETRY, box)
        assert expected.hit == np.mean([one.hit for one in drawn])
        assert expected.pointing == np.mean([one.pointing for one in drawn])
        assert expected.mass == pytest.approx(np.mean([one.mass for one in drawn]), abs=1e-12)


def rows_by_hand() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(40):
        shared = {"doc": str(index), "cluster": str(index // 2), "group": ("tiny", "large")[index % 2]}
        for source, layer, rate in (("raw", 0, 0.2), ("raw", 1, 0.9), ("tam", None, 0.1), (CHANCE, None, None)):
            hit = 0.1 if rate is None else float(rng.random() < rate)
            rows.append({**shared, "source": source, "layer": layer, "hit": hit, "pointing": 0.0, "mass": 0.5 * hit})
            rows[-1] |= {"ratio": 1.0, "iou": 0.25}
    return rows


def test_means_are_means_and_differences_are_to_chance() -> None:
    rows = rows_by_hand()
    found = summary(rows, draws=500)
    assert (found["documents"], found["images"], found["groups"]) == (40, 20, {"large": 20, "tiny": 20})
    for entry in found["sources"]:
        own = [row for row in rows if (row["source"], row["layer"]) == (entry["source"], entry["layer"])]
        for name in MEASURES:
            assert entry[name]["value"] == pytest.approx(np.mean([row[name] for row in own]), abs=1e-12)
        low, high = entry["hit"]["interval"]
        assert low <= entry["hit"]["value"] <= high
        assert entry["against_chance"]["difference"] == pytest.approx(entry["hit"]["value"] - 0.1, abs=1e-12)
        for group, value in entry["by_group"].items():
            assert value == pytest.approx(np.mean([row["hit"] for row in own if row["group"] == group]), abs=1e-12)


def test_the_page_says_what_the_record_shows() -> None:
    environment = {
        "versions": {"torch": "2", "transformers": "5"},
        "model": {"dtype": "float32", "attention": "sdpa"},
        "dirty": False,
        "commit": "0123456789",
        "device_name": "a processor",
        "started": "2026-01-01T00:00:00",
    }
    task = summary(rows_by_hand(), draws=500)
    record = {"model": "tiny-llava", "environment": environment, "tasks": {"scenes-small": task}}
    page = localisation_page(record, "localisation-tiny-llava.json", ["scenes-small"])
    assert [entry["layer"] for entry in best_entries(task)] == [1, None, None]
    assert best_entries(task)[-1]["source"] == CHANCE
    assert "more than chance does, in one layer at least, `raw`; not shown to, `tam`." in page
    assert "(localisation-tiny-llava-scenes-small.png)" in page
    assert "| hit % by layer | 0 | 1 |" in page
    assert "hit %, tiny (n = 20)" in page


@pytest.mark.parametrize("name", ["scenes-small", "scenes-pope"])
def test_tasks_know_where_things_are(name: str) -> None:
    task = get_task(name)
    assert task.region is not None
    assert task.target is not None
    there = 0
    for doc in task.load()[::7]:
        [image] = task.images(doc)
        left, top, right, bottom = task.region(doc)
        assert 0 <= left < right <= image.width
        assert 0 <= top < bottom <= image.height
        if (target := task.target(doc)) is not None:
            assert target == task.region(doc)
            there += 1
            if "label" in doc:
                assert doc["label"] == "yes"
    assert there > 50


def test_what_is_asked_about_calibration_scenes_of_one_size_has_no_place() -> None:
    task = get_task("scenes-pope")
    [doc, *_] = task.calibration()  # type: ignore[misc]
    assert task.target(doc) is None  # type: ignore[misc]
    with pytest.raises(TaskError, match="is not stored; ask about scenes of the benchmark"):
        task.region(doc)  # type: ignore[misc]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return lmmhooks.load("tiny-llava")


def test_rows_are_scores_of_the_maps(tiny: tuple[Any, Any]) -> None:
    task = get_task("scenes-small")
    docs = [next(doc for doc in task.load() if not doc["target"]), next(doc for doc in task.load() if doc["target"])]
    methods = {"mine": "carve(read_layers=(4, 5), max_new_tokens=1)"}
    rows = measure(*tiny, task, docs, methods, kinds=("raw", "flow"))
    # Only the document whose object is there; eight layers and their mean, another kind, a method and chance.
    assert {row["doc"] for row in rows} == {docs[1]["id"]}
    assert [row["source"] for row in rows] == ["raw"] * 9 + ["flow", "mine", CHANCE]
    [image] = task.images(docs[1])
    box = task.target(docs[1])  # type: ignore[misc]
    made = attention_map(*tiny, image, question_of(task, docs[1]), kind="raw", layers=[3], tokens=[0], max_new_tokens=1)
    expected = localise(made.geometry, made.values[0], box)
    [row] = [row for row in rows if (row["source"], row["layer"]) == ("raw", 3)]
    # The same numbers, read in another run of the model.
    assert row["mass"] == pytest.approx(expected.mass, abs=1e-6)
    assert row["iou"] == pytest.approx(expected.iou, abs=1e-6)
    # Nothing stays on the model.
    assert find_runtime(tiny[0]) is None or not find_runtime(tiny[0]).methods()  # type: ignore[union-attr]


def test_tasks_without_places_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(TaskError, match="'scenes-vqa' does not know where things are"):
        measure(*tiny, get_task("scenes-vqa"), [], {})
    with pytest.raises(TaskError, match="none of 0 documents"):
        measure(*tiny, get_task("scenes-small"), [], {})


def test_the_sheet_has_a_row_per_size_and_a_column_per_source(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    task = get_task("scenes-small")
    docs = shown_documents(task, task.load())
    assert [doc["size"] for doc in docs] == ["tiny", "small", "medium", "large"]
    rows = measure(*tiny, task, docs[:1], {}, kinds=("raw",))
    paths = []
    for number in (1, 2):
        paths.append(tmp_path / f"{number}.png")
        contact_sheet(*tiny, task, docs[:number], summary(rows, draws=100), {}, paths[-1])
    one, two = (Image.open(path) for path in paths)
    assert one.width == two.width
    assert two.height > 1.5 * one.height
    assert paths[1].stat().st_size < 100_000
    assert shown_documents(replace(task, target=None), task.load()) == []
