"""Scenes with small objects: labels and boxes follow from the stored objects, pixels from the stored scenes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lmmhooks_eval.plan import select
from lmmhooks_eval.tasks import get_task
from lmmhooks_eval.tasks.scenes_small import SIZES as TASK_SIZES
from lmmhooks_eval.tiny import data_dir
from lmmhooks_eval.tiny.freeze import NUM_SMALL_SCENES, small_rows
from lmmhooks_eval.tiny.small import CANVAS, SIZES, SmallScene, draw, region_of, sample_small_scene
from lmmhooks_eval.tiny.vocabulary import BY_NAME, CATEGORIES, COLOURS


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data_dir() / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def scenes() -> dict[str, SmallScene]:
    return {row["image"]: SmallScene.from_dict(row) for row in lines("small_scenes.jsonl")}


def test_the_stored_files_are_what_the_code_makes() -> None:
    for name, rows in small_rows(NUM_SMALL_SCENES).items():
        # Through JSON, which knows no tuples.
        assert lines(f"{name}.jsonl") == json.loads(json.dumps(rows))


def test_a_stored_scene_is_the_scene() -> None:
    small = sample_small_scene((1, 2))
    assert SmallScene.from_dict(json.loads(json.dumps({"image": "x", **small.to_dict()}))) == small


def test_objects_lie_apart_in_bounds_and_in_their_size_band(scenes: dict[str, SmallScene]) -> None:
    assert tuple(SIZES) == TASK_SIZES
    for small in scenes.values():
        taken = np.zeros((CANVAS, CANVAS), int)
        for item in small.scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.extent <= high
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= CANVAS
            assert 0 <= y0 < y1 <= CANVAS
            assert max(x1 - x0, y1 - y0) <= item.extent
            taken[y0:y1, x0:x1] += 1
            assert {other.size for other in small.scene.instances(item.category)} == {item.size}
        assert taken.max() == 1


def test_pixels_show_the_objects_where_their_boxes_are(scenes: dict[str, SmallScene]) -> None:
    closer = total = 0
    for small in list(scenes.values())[::6]:
        pixels = draw(small).astype(float)
        assert pixels.shape == (CANVAS, CANVAS, 3)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        for item in small.scene.objects:
            x0, y0, x1, y1 = item.box
            colour = np.asarray(COLOURS[item.colour], dtype=float)
            distance = np.linalg.norm(pixels[y0:y1, x0:x1] - colour, axis=-1)
            closer += (distance < np.linalg.norm(background - colour) / 2).mean() > 0.2
            total += 1
    # As for the scenes of one size: silhouettes fill a fifth of their box at least, noise hides a few thin ones.
    assert total > 80
    assert closer / total > 0.9


def test_pixels_are_a_function_of_the_scene() -> None:
    small = sample_small_scene((1, 3))
    first = draw(small)
    draw.cache_clear()
    assert np.array_equal(draw(small), first)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 0


def test_answers_and_regions_follow_from_the_objects(scenes: dict[str, SmallScene]) -> None:
    plurals = {category.plural: category.name for category in CATEGORIES}
    kinds: Counter[tuple[str, str]] = Counter()
    for doc in lines("scenes_small.jsonl"):
        scene = scenes[doc["image"]].scene
        words = doc["question"].rstrip("?").split()
        kinds[doc["type"], doc["answer"]] += 1
        if doc["type"] == "count":
            category = plurals[words[2]]
            expected = str(len(scene.instances(category)))
        elif doc["type"] == "colour":
            category = words[-1]
            [item] = scene.instances(category)
            expected = item.colour.capitalize()
        else:
            *colour, category = words[3:-3]
            hit = any(item.category == category and colour in ([], [item.colour]) for item in scene.objects)
            expected = "Yes" if hit else "No"
        assert doc["answer"] == expected, doc
        assert doc["target"] == (category in scene.present)
        # What is not there is asked about at the place of something else.
        shown = (
            category
            if doc["target"]
            else next(name for name in scene.present if list(region_of(scene, name)) == doc["region"])
        )
        assert tuple(doc["region"]) == region_of(scene, shown)
        assert doc["size"] == scene.instances(shown)[0].size
        assert BY_NAME[shown]
    assert kinds["existence", "Yes"] == kinds["existence", "No"]
    assert abs(kinds["attribute", "Yes"] - kinds["attribute", "No"]) < 20
    assert min(Counter(doc["size"] for doc in lines("scenes_small.jsonl")).values()) > 200


@pytest.mark.parametrize("limit", [60, 400])
def test_a_limited_sample_keeps_types_and_sizes(limit: int) -> None:
    task = get_task("scenes-small")
    docs = select(task, task.load(), limit, 0)
    # Whole scenes of up to eight documents are taken.
    assert abs(len(docs) - limit) <= 8
    for field, number in (("type", 4), ("size", 4)):
        shares = Counter(doc[field] for doc in docs)
        assert len(shares) == number
        assert min(shares.values()) > len(docs) / number / 2


def test_documents_for_calibration_are_about_other_scenes() -> None:
    task = get_task("scenes-small")
    assert task.calibration is not None
    docs = task.calibration()
    assert {doc["id"] for doc in docs}.isdisjoint(doc["id"] for doc in task.load())
    (own,), (other,) = task.images(docs[0]), task.images(task.load()[0])
    assert own.size == other.size
    assert own.tobytes() != other.tobytes()
