"""Measuring head lists and directions on the bundled model, against the same things done by hand."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import LmmhooksError
from lmmhooks.methods.attention.act import Act
from lmmhooks.methods.attention.directions import textual_direction, visual_direction
from lmmhooks_eval.calibration import calibrate, procedure_for
from lmmhooks_eval.calibration.documents import demos_from_file, demos_from_task, documents
from lmmhooks_eval.calibration.heads import HeadSearch, Journal
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import prepare, select
from lmmhooks_eval.progress import RunProgress
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import get_task

# Only layer 3 is searched; editing its head 3 breaks most answers, editing its head 0 none.
ONE_LAYER = Act(skip_layers=(0, 1, 2, 4, 5, 6, 7))
SMALL = {"task": "scenes-pope", "limit": 12, "batch_size": 5}


@pytest.fixture(scope="module")
def tiny():
    return lmmhooks.load("tiny-llava", dtype="float32")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")


@pytest.fixture(scope="module")
def unedited(tiny) -> float:
    return by_hand(tiny, "attention-identity")


def by_hand(tiny, method) -> float:
    """Accuracy of first tokens, one document at a time."""
    model, processor = tiny
    task = get_task("scenes-pope")
    generator, right = Generator(model, processor), 0.0
    docs = select(task, task.calibration(), 12, 0)
    for doc in docs:
        item = prepare(task, doc, processor)
        with lmmhooks.wrap(model, method):
            (answer,), _ = generator.ask([item.prompt], [task.images(doc)], {"max_new_tokens": 1}, 0)
        right += task.score(task.parse(answer.text, doc).value, doc)["correct"]
    return right / len(docs)


def test_head_search_scores_every_head_alone(tiny, unedited, tmp_path):
    record, path = calibrate(ONE_LAYER, *tiny, SMALL, tmp_path / "heads.json")
    evidence = record.evidence
    scores = {(layer, head): score for layer, head, score in evidence["scores"]}
    assert scores.keys() == {(3, head) for head in range(6)}
    for head in (0, 3):
        alone = Act(heads={3: [head]}, skip_layers=ONE_LAYER.skip_layers)
        assert scores[3, head] == pytest.approx(by_hand(tiny, alone), abs=1e-6)
    assert evidence["unedited"] == pytest.approx(unedited)
    assert scores[3, 3] < evidence["unedited"], "a search in which nothing changes would prove nothing"
    kept = {head for (_, head), score in scores.items() if score > evidence["unedited"]}
    assert set(record.value.get("3", [])) == kept
    assert not evidence["documents_are_benchmark"]
    assert evidence["settings"]["beta"] == 0.4
    assert not path.with_name("heads.partial.jsonl").exists()


class Interrupting(RunProgress):
    """Stops a search when it begins with a certain head, and notes what was entered."""

    def __init__(self, stop: str = "") -> None:
        self.stop = stop
        self.entered: list[str] = []

    def enter(self, task: str, variant: str) -> None:
        if variant == self.stop:
            raise KeyboardInterrupt
        self.entered.append(variant)


def test_an_interrupted_search_continues(tiny, tmp_path):
    out = tmp_path / "heads.json"
    with pytest.raises(KeyboardInterrupt):
        calibrate(ONE_LAYER, *tiny, SMALL, out, Interrupting("layer 3, head 2"))
    journal = tmp_path / "heads.partial.jsonl"
    header, *lines = journal.read_text().splitlines()
    assert [json.loads(line)[:2] for line in lines] == [[3, 0], [3, 1]]
    # Scores no model has, and a torn last line: what is on record is used, what is torn is measured again.
    journal.write_text(f"{header}\n[3, 0, 2.0]\n[3, 1, 2.0]\n[3, 2, 0.")
    seen = Interrupting()
    record, _ = calibrate(ONE_LAYER, *tiny, SMALL, out, seen)
    assert seen.entered == ["no edit", *(f"layer 3, head {head}" for head in (2, 3, 4, 5))]
    assert record.value["3"][:2] == [0, 1]


def test_a_journal_of_another_search_is_not_used(tmp_path):
    file = tmp_path / "j.jsonl"
    Journal(file, {"seed": 0}).add(3, 1, 0.5)
    assert (3, 1) in Journal(file, {"seed": 0})
    assert len(Journal(file, {"seed": 1})) == 0


def test_a_head_is_kept_only_above_the_margin(tiny, unedited, tmp_path):
    for margin, kept in ((0.0, [0, 1]), (0.3, [1])):
        options = {**SMALL, "margin": margin}
        with pytest.raises(KeyboardInterrupt):
            calibrate(ONE_LAYER, *tiny, options, tmp_path / "h.json", Interrupting("layer 3, head 0"))
        journal = tmp_path / "h.partial.jsonl"
        scores = [unedited + change for change in (0.2, 0.4, 0.0, -0.1, 0.0, 0.0)]
        journal.write_text(journal.read_text() + "".join(f"[3, {h}, {s}]\n" for h, s in enumerate(scores)))
        record, _ = calibrate(ONE_LAYER, *tiny, options, tmp_path / "h.json")
        assert record.value == {"3": kept}


def test_a_task_that_no_first_token_answers_is_refused(tiny, tmp_path):
    with pytest.raises(TaskError, match=r"answers to 'scenes-caption' cannot be read from their first token"):
        calibrate(ONE_LAYER, *tiny, {"task": "scenes-caption", "limit": 4}, tmp_path / "h.json")


def test_directions_are_those_of_states_that_transformers_reports(tiny, tmp_path):
    model, processor = tiny
    options = {"limit": 3, "trials": 3, "batch_size": 2, "mask_ratio": 1.0}
    record, path = calibrate(lmmhooks.method("vti"), model, processor, options, tmp_path / "d.json")
    demos, _ = demos_from_task(get_task("scenes-caption"), processor, 3, 42)
    textual, visual = [], []
    for demo in demos:
        ends = []
        for answer in (demo.value, demo.h_value):
            inputs = processor(
                images=[demo.images[0].convert("RGB")], text=[f"{demo.prompt} {answer}"], return_tensors="pt"
            )
            layers = []
            hooks = [
                layer.register_forward_hook(lambda m, a, out, layers=layers: layers.append(out[0, -1]))
                for layer in model.model.language_model.layers
            ]
            with torch.no_grad():
                model(**inputs)
                first = model.get_input_embeddings()(inputs["input_ids"])[0, -1]
            for hook in hooks:
                hook.remove()
            ends.append(torch.stack([first, *layers]))
        textual.append(ends[0] - ends[1])
        pixels = inputs["pixel_values"]
        # With every patch masked all copies are the same plain image.
        grey = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)
        with torch.no_grad():
            clean, masked = (
                torch.stack(model.model.vision_tower(x, output_hidden_states=True).hidden_states)[:, 0]
                for x in (pixels, grey)
            )
        visual.append(masked - clean)
    found = record.value
    # The unit component multiplies float32 noise of the states by the inverse of their spread.
    torch.testing.assert_close(found["textual"], textual_direction(torch.stack(textual)), atol=1e-3, rtol=0)
    torch.testing.assert_close(found["visual"], visual_direction(torch.stack(visual)), atol=1e-3, rtol=0)
    assert found["textual"].shape == (8, 192)
    assert found["visual"].shape == (5, 65, 128)
    with lmmhooks.wrap(model, f"vti(directions='{path}')", processor=processor) as patch:
        assert patch.methods[0].directions == found


def test_directions_do_not_depend_on_the_order_of_demonstrations(tiny, tmp_path):
    rows = [
        {
            "image": f"{i}.png",
            "question": "Describe the image.",
            "value": f"a {colour} cup",
            "h_value": "a cup and a bus",
        }
        for i, colour in enumerate(("red", "blue", "green"))
    ]
    for row, colour in zip(rows, ("red", "blue", "green"), strict=True):
        Image.new("RGB", (40, 30), colour).save(tmp_path / row["image"])
    values = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in order) + "\n")
        options = {"demos": str(file), "trials": 2, "mask_ratio": 1.0}
        values.append(calibrate(lmmhooks.method("vti"), *tiny, options, tmp_path / f"{name}.json")[0].value)
    torch.testing.assert_close(values[0]["textual"], values[1]["textual"], atol=1e-3, rtol=0)
    torch.testing.assert_close(values[0]["visual"], values[1]["visual"], atol=1e-3, rtol=0)


def test_sink_channels_are_measured_on_request(tiny):
    record, _ = calibrate(lmmhooks.method("var"), *tiny)
    assert record.value == []
    assert "strongest channel" in record.evidence["summary"]
    with pytest.raises(lmmhooks.MethodError, match=r"sink_dims could not be found .*sink_dims='any'"):
        lmmhooks.wrap(tiny[0], "var")


def test_calibration_documents_are_no_benchmark_documents():
    for name in ("scenes-pope", "scenes-vqa", "scenes-caption", "scenes-small"):
        task = get_task(name)
        docs, is_benchmark = documents(task)
        assert not is_benchmark
        assert len({doc["id"] for doc in docs}) == len(docs)
    task = get_task("scenes-caption")
    asked = {task.images(doc)[0].convert("RGB").tobytes() for doc in task.load()}
    drawn = {task.images(doc)[0].convert("RGB").tobytes() for doc in task.calibration()}
    assert len(drawn) == len(task.calibration())
    assert not asked & drawn


def test_a_wrong_caption_names_only_more(tiny):
    demos, _ = demos_from_task(get_task("scenes-caption"), tiny[1], None, 0)
    task = get_task("scenes-caption")
    for demo, doc in zip(demos, task.calibration(), strict=True):
        true, invented = (set(task.parse(text, doc).value["objects"]) for text in (demo.value, demo.h_value))
        assert true == set(doc["objects"])
        assert true < invented
        assert len(invented - true) <= 2


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("vcd", {}, "vcd has no setting that `lmmhooks calibrate` measures"),
        ("vti", {"margin": 0.1}, "--margin does not apply to vti, whose directions are measured with --task, --demos"),
        ("act", {"mask_ratio": 0.5}, "--mask-ratio does not apply to act"),
        ("act", {"task": "scenes-pop"}, "did you mean 'scenes-pope'"),
        ("act", {"margin": 1.0}, "margin"),
        ("vti", {"mask_ratio": 0.0}, "mask_ratio"),
        ("vti", {"grouping": "layer"}, "grouping"),
    ],
)
def test_options_that_do_not_apply_are_refused(method, options, message):
    with pytest.raises(LmmhooksError, match=message):
        procedure_for(lmmhooks.method(method), options)


def test_demonstrations_are_read_with_the_line_named(tiny, tmp_path):
    file = tmp_path / "d.jsonl"
    with pytest.raises(TaskError, match=r"d\.jsonl cannot be read"):
        demos_from_file(file, tiny[1], None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"image": "a.png", "question": "What?", "value": "x", "h_value": "y"}
    for line, message in (("{", "needs image"), ('{"image": "a.png"}', "needs image"),
                          (json.dumps(good | {"image": "b.png"}), "b.png' does not exist")):  # fmt: skip
        file.write_text(f"{json.dumps(good)}\n\n{line}\n")
        with pytest.raises(TaskError, match=rf"d\.jsonl, line 3: .*{message}"):
            demos_from_file(file, tiny[1], None)
    file.write_text(f"{json.dumps(good)}\n" * 3)
    assert len(demos_from_file(file, tiny[1], 2)) == 2


def test_a_task_without_demonstrations_says_where_to_get_them(tiny):
    with pytest.raises(TaskError, match=r"'scenes-pope' has no demonstrations.*scenes-caption.*--demos FILE"):
        demos_from_task(get_task("scenes-pope"), tiny[1], 3, 0)


def test_one_demonstration_is_not_enough(tiny, tmp_path):
    with pytest.raises(TaskError, match="at least 2 demonstrations, given: 1"):
        calibrate(lmmhooks.method("vti"), *tiny, {"limit": 1, "trials": 1}, tmp_path / "d.json")


def test_documents_of_a_benchmark_are_marked(tiny, tmp_path, monkeypatch):
    task = get_task("scenes-pope")
    held = Task(**{**vars(task), "calibration": None})
    monkeypatch.setattr("lmmhooks_eval.calibration.heads.get_task", lambda name: held)
    search = HeadSearch(limit=4)
    _, evidence = search.measure(ONE_LAYER, Generator(*tiny), tmp_path / "j.jsonl", Interrupting())
    assert evidence["documents_are_benchmark"]
    assert set(evidence["documents"]) <= {doc["id"] for doc in task.load()}


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen"])
def test_bundled_models_carry_their_directions(name):
    model, processor = lmmhooks.load(name, dtype="float32")
    with lmmhooks.wrap(model, "vti", processor=processor) as patch:
        (method,) = patch.methods
        assert method.directions["textual"].shape == (model.config.text_config.num_hidden_layers, 192)
        image = get_task("scenes-pope").images(get_task("scenes-pope").load()[0])[0]
        assert patch.answer(image, "Is there a tree in the image?", max_new_tokens=2, do_sample=False) in ("Yes", "No")


def test_the_bundled_llava_carries_a_head_list():
    model, processor = lmmhooks.load("tiny-llava", dtype="float32")
    with lmmhooks.wrap(model, "act", processor=processor) as patch:
        assert patch.methods[0].heads
        assert patch.attached
