"""The task chair: COCO's words, its three sources of ground truth, and the real captions' published figures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.metrics import coco
from lmmhooks_eval.recipe import DataPlan, TaskPlan
from lmmhooks_eval.tasks import chair as chair_task
from lmmhooks_eval.tasks import open_task, sources
from tests.eval.shared import read_lines, shared_file

# In the form of the released list: node word first, two entries with a second space.
SYNONYMS = """person, man, woman, child, skier
motorcycle, scooter,  motor bike, motorbike
dog, puppy
hot dog
bus, minibus
train
airplane, jet
skis, ski
tie
toilet
chair, seat, stool
knife, pocketknife
wine glass
"""


def at(**data: Any) -> Any:
    return open_task(TaskPlan(name="chair", data=DataPlan(**data)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    (tmp_path / "images").mkdir()
    for number in (7, 42):
        Image.new("RGB", (number, 10)).save(tmp_path / "images" / f"COCO_val2014_{number:012d}.jpg")
    return tmp_path


@pytest.fixture
def annotated(folder: Path) -> Path:
    """COCO's own annotation files: 42 shows a dog, and a caption of it names a train; 7 is seen by captions alone."""
    instances = {
        "categories": [{"id": 18, "name": "dog"}, {"id": 7, "name": "train"}],
        "images": [{"id": 7}, {"id": 42}, {"id": 99}],
        "annotations": [{"image_id": 42, "category_id": 18}, {"image_id": 42, "category_id": 18}],
    }
    captions = {
        "annotations": [
            {"image_id": 42, "caption": "Two puppies wait for a passenger train."},
            {"image_id": 7, "caption": "A scooter beside a hot dog stand."},
        ]
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(captions))
    return folder


def nodes(folder: Path, caption: str) -> list[str]:
    return at(folder=str(folder)).parse(caption, {}).value["objects"]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A motorbike.", ["motorcycle"]),
        ("A motor bike.", []),  # the list holds " motor bike": released like that, never matches
        ("A hot dog.", ["hot dog"]),
        ("A baby dog and an adult bear.", ["dog"]),
        ("A passenger jet over a passenger train.", ["airplane", "train"]),
        ("A bow tie.", ["tie"]),
        ("The toilet seat is up.", ["toilet"]),
        ("A toilet beside a seat.", ["toilet"]),
        ("A seat.", ["chair"]),
        ("Two children on skis; one has a ski and three knives.", ["person", "skis", "skis", "knife"]),
        ("Two men wait for buses.", ["bus"]),  # the WordNet variant leaves "men", which is no word of the list
        ("Wine glasses.", ["wine glass"]),
        ("A dog, a dog and a dog.", ["dog", "dog", "dog"]),
    ],
)
def test_words_as_the_released_scorer_reads_them(folder: Path, caption: str, found: list[str]) -> None:
    assert nodes(folder, caption) == found


def test_only_the_short_caption_parser_drops_a_sentence_that_was_cut_off(folder: Path) -> None:
    task = at(folder=str(folder))
    cut = "There is a dog. Next to it stands a train, and behind"
    assert task.parse(cut, {}).value["objects"] == ["dog", "train"]
    assert task.parse(cut, {}, "chair-builtin-whole-sentences").value["objects"] == ["dog"]
    whole = "There is a dog. There is a train."
    assert task.parse(whole, {}, "chair-builtin-whole-sentences").value == task.parse(whole, {}).value
    assert task.parse("A dog and", {}, "chair-builtin-whole-sentences").value["objects"] == []


def test_ground_truth_is_instances_and_reference_captions(annotated: Path) -> None:
    docs = at(folder=str(annotated)).load()
    assert list(docs) == [
        {"id": "7", "objects": ["hot dog", "motorcycle"]},
        {"id": "42", "objects": ["dog", "train"]},
    ]


def test_a_list_of_objects_replaces_the_annotations(folder: Path) -> None:
    listed = {"categories": ["dog", "bus"], "objects": {"7": [], "42": [1, 0], "99": [0]}}
    (folder / "coco2014_objects.json").write_text(json.dumps(listed))
    task = at(folder=str(folder))
    assert [doc["objects"] for doc in task.load()] == [[], ["bus", "dog"]]
    assert task.images(task.load()[1])[0].size == (42, 10)


def _ids(folder: Path, text: str) -> Path:
    (folder / "ids.txt").write_text(text)
    return folder / "ids.txt"


def test_a_published_list_of_images_can_be_named(annotated: Path) -> None:
    assert [doc["id"] for doc in at(folder=str(annotated), ids=str(_ids(annotated, "42\n"))).load()] == ["42"]


def test_the_hub_dataset_in_its_own_schema(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the hub is read through datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_dict(
        {
            "question_id": [42, 7],
            "image": [Image.new("RGB", (42, 10)), Image.new("RGB", (7, 10))],
            "gt_object": [["train", "dog", "dog"], []],
        }
    ).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "mirror" / "data" / "test-00000-of-00001.parquet")
    task = at(hub=str(tmp_path / "mirror"))
    assert [{key: doc[key] for key in ("id", "objects")} for doc in task.load()] == [
        {"id": "42", "objects": ["dog", "train"]},
        {"id": "7", "objects": []},
    ]
    assert [task.images(doc)[0].size[0] for doc in task.load()] == [42, 7]


def test_problems_are_one_line(folder: Path) -> None:
    with pytest.raises(TaskError, match=r"has no annotations/instances_val2014\.json; put it there"):
        at(folder=str(folder)).load()
    (folder / "coco2014_objects.json").write_text('{"objects": {"7": [0]}}')
    with pytest.raises(TaskError, match="is no list of objects"):
        at(folder=str(folder)).load()
    (folder / "coco2014_objects.json").write_text('{"categories": ["dog"], "objects": {"7": [0]}}')
    with pytest.raises(TaskError, match=r"000042\.jpg has no ground truth"):
        at(folder=str(folder)).load()
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(TaskError, match="hold no image whose name ends in a COCO id"):
        at(folder=str(folder)).load()
    with pytest.raises(TaskError, match="its files are synonyms, objects"):
        at(folder=str(folder), files={"labels": "x"})
    (folder / "synonyms.txt").write_text("dog\n\ncat\n")
    with pytest.raises(TaskError, match="line 2 of the synonym list is empty"):
        at(folder=str(folder)).parse("A dog.", {})


def test_the_synonym_list_is_fetched_once_and_checked(tmp_path: Path) -> None:
    origin = tmp_path / "origin.txt"
    origin.write_text(SYNONYMS)
    digest = hashlib.sha256(SYNONYMS.encode()).hexdigest()
    path = sources.fetch(origin.as_uri(), digest, "list.txt", tmp_path / "cache")
    assert path.read_text() == SYNONYMS
    origin.unlink()
    assert sources.fetch(origin.as_uri(), digest, "list.txt", tmp_path / "cache") == path
    with pytest.raises(TaskError, match=r"cannot be downloaded from file://.*get it by other means and put it in"):
        sources.fetch(origin.as_uri(), digest, "other.txt", tmp_path / "cache")
    origin.write_text("changed")
    with pytest.raises(TaskError, match="is not the file it was"):
        sources.fetch(origin.as_uri(), digest, "other.txt", tmp_path / "cache")
    assert not (tmp_path / "cache" / "other.txt").exists()


def test_the_pinned_digest_is_that_of_the_released_list() -> None:
    content = shared_file("chair/synonyms.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == chair_task._SYNONYMS_SHA256
    synonyms = coco.read_synonyms(content.decode())
    assert len(synonyms) == 80
    spaced = [word for words in synonyms.values() for word in words if word != word.strip()]
    assert spaced == [" motor bike", " cheesecake"]


# Published: OPERA's paper prints 48.8/13.9 and 44.6/12.8; the rest are its released captions scored by its own script.
@pytest.mark.parametrize(
    ("captions", "chair_s", "chair_i", "recall", "length"),
    [("beam5", 48.8, 13.85, 79.9, 95.7), ("greedy", 44.8, 12.7, 80.0, 96.9), ("opera", 44.6, 12.7, 79.2, 92.7)],
)
def test_the_real_captions_give_the_published_figures(
    captions: str, chair_s: float, chair_i: float, recall: float, length: float
) -> None:
    task = at(folder=str(shared_file("chair")))
    path = shared_file("chair/coco2014_objects.json.gz")
    truth = chair_task._Folder(DataPlan(folder=str(path.parent)), chair_task._Words(DataPlan()))._listed(path)
    rows = read_lines(f"chair/captions_llava15_7b_{captions}.jsonl.gz")
    scores = [
        task.score(task.parse(row["caption"], {}).value, {"objects": truth[str(row["image_id"])]}) for row in rows
    ]
    figures = task.aggregate({name: np.asarray(sum(score[name] for score in scores)) for name in scores[0]})
    # The scorer's figures use WordNet; ours does not, and differs from it in a handful of words of 500 captions.
    assert 100 * float(figures["chair_s"]) == pytest.approx(chair_s, abs=0.05)
    assert 100 * float(figures["chair_i"]) == pytest.approx(chair_i, abs=0.05)
    assert 100 * float(figures["recall"]) == pytest.approx(recall, abs=0.3)
    assert float(figures["length"]) == pytest.approx(length, abs=0.1)
