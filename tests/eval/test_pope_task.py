"""The task pope: official files and hub rows give the same documents, and the real answers the published figures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.plan import prepare
from lmmhooks_eval.recipe import DataPlan, TaskPlan
from lmmhooks_eval.tasks import get_task, open_task
from tests.eval.shared import read_lines, shared_file

SPLITS = ("random", "popular", "adversarial")
IMAGES = ("COCO_val2014_000000000042", "COCO_val2014_000000310196")


def questions(split: str) -> list[dict[str, Any]]:
    """Two questions about each of two images, written for this test in the official schema."""
    return [
        {
            "question_id": 2 * index + number + 1,
            "image": f"{image}.jpg",
            "text": f"Is there a {split} thing {number} in the image?",
            "label": ("yes", "no")[number],
        }
        for index, image in enumerate(IMAGES)
        for number in (0, 1)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in SPLITS:
        lines = "".join(json.dumps(row) + "\n" for row in questions(split))
        (tmp_path / f"coco_pope_{split}.json").write_text(lines)
    (tmp_path / "val2014").mkdir()
    for index, image in enumerate(IMAGES):
        Image.new("RGB", (20 + index, 10), (index, 0, 0)).save(tmp_path / "val2014" / f"{image}.jpg")
    return tmp_path


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """The hub repository in its own layout: configuration Full, one Parquet file per split, images inside."""
    datasets = pytest.importorskip("datasets", reason="the hub is read through datasets")
    path = tmp_path / "POPE"
    for split in SPLITS:
        rows: dict[str, list[Any]] = {name: [] for name in ("id", "question_id", "question", "answer", "image_source")}
        for number, row in enumerate(questions(split)):
            rows["id"].append(str(number))
            rows["question_id"].append(str(row["question_id"]))
            rows["question"].append(row["text"])
            rows["answer"].append(row["label"])
            rows["image_source"].append(Path(row["image"]).stem)
        rows["image"] = [Image.new("RGB", (20 + number // 2, 10)) for number in range(4)]
        rows["category"] = [split] * 4
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        (path / "Full").mkdir(parents=True, exist_ok=True)
        table.to_parquet(path / "Full" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: Full/{split}-*\n" for split in SPLITS)
    (path / "README.md").write_text(f"---\nconfigs:\n- config_name: Full\n  data_files:\n{files}---\n")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What datasets prepares goes into the test's folder, not into the user's cache."""
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def at(**data: Any) -> Any:
    return open_task(TaskPlan(name="pope", data=DataPlan(**data)))


def test_official_files_give_documents_by_split_and_number(folder: Path) -> None:
    task = at(folder=str(folder))
    docs = task.load()
    assert len(docs) == 12
    assert docs[5] == {
        "id": "popular/2",
        "split": "popular",
        "question": "Is there a popular thing 1 in the image?",
        "label": "no",
        "image": "COCO_val2014_000000000042.jpg",
    }
    assert task.images(docs[-1])[0].size == (21, 10)
    assert task.cluster(docs[0]) == task.cluster(docs[1]) != task.cluster(docs[2])
    assert {task.stratum(doc) for doc in docs} == {f"{split}/{label}" for split in SPLITS for label in ("yes", "no")}
    assert task.source().kind == "local"
    assert len(task.source().revision) == 16


def test_the_hub_gives_the_same_documents(folder: Path, mirror: Path) -> None:
    local, hub = at(folder=str(folder)), at(hub=str(mirror))
    without_row = [{key: value for key, value in doc.items() if key != "row"} for doc in hub.load()]
    assert without_row == list(local.load())
    for doc in hub.load():
        (image,) = hub.images(doc)
        assert image.size == (20 + IMAGES.index(Path(doc["image"]).stem), 10)
    assert hub.source().kind == "hub"
    assert hub.source().id == str(mirror)


def test_documents_can_be_stored_and_asked(folder: Path) -> None:
    class Processor:
        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            return messages[-1]["content"][1]["text"]

    task = at(folder=str(folder))
    doc = json.loads(json.dumps(dict(task.load()[0])))
    item = prepare(task, doc, Processor())
    assert item.error is None
    assert item.prompt == "Is there a random thing 0 in the image?\nAnswer the question using a single word or phrase."
    (folder / "val2014" / f"{IMAGES[0]}.jpg").unlink()
    gone = prepare(at(folder=str(folder)), doc, Processor())
    assert "no image COCO_val2014_000000000042.jpg" in str(gone.error)


@pytest.mark.parametrize(
    ("prompt", "suffix"),
    [
        ("llava", "\nAnswer the question using a single word or phrase."),
        ("lmms-eval", "\nAnswer the question using a single word or phrase."),
        ("cd-rethink", " Answer the question using a single word or phrase."),
        ("vcd", " Please answer this question with one word."),
        ("vlmevalkit", ""),
        ("vlmevalkit-qwen", " Please answer yes or no."),
        ("bare", ""),
        ("vaf", " Please just answer yes or no."),
    ],
)
def test_wordings_of_the_pipelines(folder: Path, prompt: str, suffix: str) -> None:
    task = at(folder=str(folder))
    doc = task.load()[0]
    (message,) = task.messages(doc, prompt)
    assert message["content"][-1]["text"] == doc["question"] + suffix


def test_another_release_of_a_split_can_be_named(folder: Path) -> None:
    with gzip.open(folder / "first_release.jsonl.gz", "wt") as stream:
        stream.write(json.dumps(questions("random")[0]) + "\n")
    docs = at(folder=str(folder), files={"random": "first_release.jsonl"}).load()
    assert [doc["id"] for doc in docs if doc["split"] == "random"] == ["random/1"]


def test_a_list_of_ids_restricts_and_orders(folder: Path) -> None:
    (folder / "ids.txt").write_text("popular/3\nrandom/1\n")
    docs = at(folder=str(folder), ids=str(folder / "ids.txt")).load()
    assert [doc["id"] for doc in docs] == ["popular/3", "random/1"]
    for text, problem in (
        ("random/9", "1 unknown ids, first 'random/9'"),
        ("", "no ids"),
        ("random/1 random/1", "repeated"),
    ):
        (folder / "ids.txt").write_text(text)
        with pytest.raises(TaskError, match=problem):
            at(folder=str(folder), ids=str(folder / "ids.txt")).load()
    with pytest.raises(TaskError, match="cannot be read"):
        at(folder=str(folder), ids=str(folder / "gone.txt")).load()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question_id": 1, "image": "a.jpg", "text": "?"}', "line 1, lacks label"),
        ("{", "line 1, is not JSON"),
        ("7", "line 1, lacks question_id, image, text, label"),
        ('{"question_id": 1, "image": "a.jpg", "text": "?", "label": "maybe"}', "label 'maybe', not yes or no"),
    ],
)
def test_damaged_files_are_named_with_their_line(folder: Path, line: str, problem: str) -> None:
    (folder / "coco_pope_random.json").write_text(line + "\n")
    with pytest.raises(TaskError, match=problem) as caught:
        at(folder=str(folder)).load()
    assert "\n" not in str(caught.value)


def test_repeated_questions_are_refused(folder: Path) -> None:
    (folder / "coco_pope_random.json").write_text(2 * (json.dumps(questions("random")[0]) + "\n"))
    with pytest.raises(TaskError, match="two documents have the id 'random/1'"):
        at(folder=str(folder)).load()


def test_missing_files_columns_and_datasets_are_one_line(folder: Path, mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"has no coco_pope_random\.json or coco_random\.jsonl"):
        at(folder=str(tmp_path / "empty")).load()
    with pytest.raises(TaskError, match="its files are those of the splits"):
        at(folder=str(folder), files={"easy": "a.json"}).load()
    from datasets import Dataset

    Dataset.from_dict({"question": ["?"]}).to_parquet(mirror / "Full" / "random-00000-of-00001.parquet")
    other = mirror.rename(mirror.with_name("damaged"))
    with pytest.raises(TaskError, match=r"none of the datasets .* can be had|lacks the columns question_id") as caught:
        at(hub=str(other)).load()
    assert "\n" not in str(caught.value)


def test_bundled_tasks_take_no_data(folder: Path) -> None:
    with pytest.raises(TaskError, match=r"'scenes-pope' comes with its data; drop its data\.folder"):
        open_task(TaskPlan(name="scenes-pope", data=DataPlan(folder=str(folder))))


def test_listing_and_scoring_touch_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a connection was opened"))
    task = get_task("pope")
    assert task.source().id == "lmms-lab-encoder/POPE"
    doc = {"id": "random/1", "split": "random", "label": "no", "image": "a.jpg", "question": "?"}
    assert task.score(task.parse("No.", doc).value, doc)["correct"] == 1


@pytest.mark.parametrize(("decoding", "accuracy"), [("greedy", 85.41), ("sample", 81.73)])
def test_the_real_answers_give_the_published_figures_through_the_task(decoding: str, accuracy: float) -> None:
    """Mean accuracy over the splits of the published 87.0/85.9/83.33 (greedy) and 83.63/81.73/79.83 (sampled)."""
    task = at(folder=str(shared_file("pope")))
    answers = {
        f"{split}/{row['question_id']}": row["text"]
        for split in SPLITS
        for row in read_lines(f"pope/answers_llava15_7b_{decoding}_{split}.jsonl.gz")
    }
    docs = task.load()
    assert len(docs) == len(answers) == 9000
    scores = [task.score(task.parse(answers[doc["id"]], doc).value, doc) for doc in docs]
    names = sorted({name for score in scores for name in score})
    totals = {name: np.asarray(sum(score.get(name, 0.0) for score in scores)) for name in names}
    assert 100 * float(task.aggregate(totals)["accuracy"]) == pytest.approx(accuracy, abs=0.01)
    assert len({task.cluster(doc) for doc in docs}) == 500


def test_the_first_release_of_the_random_split_has_2910_questions() -> None:
    folder = shared_file("pope")
    docs = at(folder=str(folder), files={"random": "coco_random_2910.jsonl"}).load()
    labels = [doc["label"] for doc in docs if doc["split"] == "random"]
    assert (labels.count("yes"), labels.count("no")) == (1500, 1410)
