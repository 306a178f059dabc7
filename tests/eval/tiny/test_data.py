"""The frozen benchmark agrees with itself: every label follows from the stored objects."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmmhooks_eval.tiny import data_dir
from lmmhooks_eval.tiny.probes import SPLITS
from lmmhooks_eval.tiny.vocabulary import CATEGORIES, COLOURS, THEMES


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data_dir() / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def scenes() -> dict[str, dict[str, Any]]:
    return {scene["image"]: scene for scene in lines("scenes.jsonl")}


def test_images_exist_and_the_folder_stays_small(scenes: dict[str, dict[str, Any]]) -> None:
    stored = {f"images/{path.name}" for path in (data_dir() / "images").iterdir()}
    assert stored == set(scenes)
    assert sum(path.stat().st_size for path in data_dir().rglob("*") if path.is_file()) <= 6_000_000
    for image in list(scenes)[:10]:
        picture = Image.open(data_dir() / image)
        assert picture.size == (112, 112)
        assert picture.mode == "RGB"


def test_boxes_hold_their_objects(scenes: dict[str, dict[str, Any]]) -> None:
    closer = total = 0
    for scene in scenes.values():
        pixels = np.asarray(Image.open(data_dir() / scene["image"]), dtype=float)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        for item in scene["objects"]:
            x0, y0, x1, y1 = item["box"]
            assert 0 <= x0 < x1 <= 112
            assert 0 <= y0 < y1 <= 112
            if item["faint"]:
                continue
            colour = np.asarray(COLOURS[item["colour"]], dtype=float)
            distance = np.linalg.norm(pixels[y0:y1, x0:x1] - colour, axis=-1)
            to_background = np.linalg.norm(background - colour)
            closer += (distance < to_background / 2).mean() > 0.2
            total += 1
    # Silhouettes fill a fifth of their box at the very least; heavy noise hides a few of the thin ones.
    assert closer / total > 0.9


def test_probe_labels_and_balance(scenes: dict[str, dict[str, Any]]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for line in lines("scenes_pope.jsonl"):
        scene = scenes[line["image"]]
        present = {item["category"] for item in scene["objects"]}
        assert (line["label"] == "yes") == (line["category"] in present)
        assert line["category"] in line["question"]
        if line["split"] == "adversarial" and line["label"] == "no":
            assert line["category"] in THEMES[scene["theme"]]
        counts[line["split"], line["label"]] += 1
    for split in SPLITS:
        assert counts[split, "yes"] == counts[split, "no"] > 500


def test_vqa_answers(scenes: dict[str, dict[str, Any]]) -> None:
    plurals = {category.plural: category.name for category in CATEGORIES}
    kinds = Counter()
    for line in lines("scenes_vqa.jsonl"):
        objects = scenes[line["image"]]["objects"]
        words = line["question"].rstrip("?").split()
        kinds[line["type"]] += 1
        if line["type"] == "count":
            expected = str(sum(item["category"] == plurals[words[2]] for item in objects))
        elif line["type"] == "colour":
            expected = next(item["colour"] for item in objects if item["category"] == words[-1]).capitalize()
        else:
            *colour, category = words[3:-3]
            hit = any(i["category"] == category and colour in ([], [i["colour"]]) for i in objects)
            expected = "Yes" if hit else "No"
        assert line["answer"] == expected, line
    assert min(kinds.values()) > 200
    assert set(kinds) == {"existence", "colour", "attribute", "count"}


def test_caption_objects(scenes: dict[str, dict[str, Any]]) -> None:
    for line in lines("scenes_caption.jsonl"):
        assert set(line["objects"]) == {item["category"] for item in scenes[line["image"]]["objects"]}


def test_vocabulary_file_names_the_whole_world() -> None:
    vocabulary = json.loads((data_dir() / "vocab.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in vocabulary["categories"]] == [category.name for category in CATEGORIES]
    words = [w for e in vocabulary["categories"] for w in (e["name"], e["plural"], *e["synonyms"])]
    assert len(words) == len(set(words))
    assert vocabulary["colours"] == list(COLOURS)


def test_ids_are_unique() -> None:
    for name in ("scenes", "scenes_pope", "scenes_vqa", "scenes_caption"):
        ids = [line["id"] for line in lines(f"{name}.jsonl")]
        assert len(ids) == len(set(ids))
