"""Runs of a real (untrained) model under real patches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lmmhooks.errors import MethodError, PromptError
from lmmhooks_eval import runner as runner_module
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.loading import load_model
from lmmhooks_eval.recipes import build
from lmmhooks_eval.runner import run
from lmmhooks_eval.score import score_run
from lmmhooks_eval.store import read_samples
from lmmhooks_eval.task import Task
from lmmhooks_eval.tasks import get_task
from tests.eval.test_plan import make_task

VARIANTS = {
    "same": ["attention-identity"],
    "few": ["fastervlm(keep=16)"],
    "both": ["fastervlm(keep=16)", "var(sink_dims='any')"],
}


def _recipe(model: Path, **changes: Any) -> Any:
    settings = {
        "name": "test",
        "model": str(model),
        "dtype": "float32",
        "tasks": [{"name": "scenes-vqa", "limit": 9, "generation": {"max_new_tokens": 3}}],
        "variants": VARIANTS,
        "batch_size": 4,
        "self_test": 2,
        "max_unparsed": 1.0,
        "statistics": {"draws": 100},
    }
    return build({**settings, **changes}, "test")


def _texts(path: Path) -> dict[tuple[str, str], str]:
    return {(record["variant"], record["doc_id"]): record["text"] for record in read_samples(path) if "text" in record}


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(_recipe(model_folder))


@pytest.fixture(autouse=True)
def _load_once(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One model for all runs of this file: every run must leave it as it found it."""
    monkeypatch.setattr(runner_module, "load_model", lambda recipe: loaded)


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    assert run(_recipe(model_folder), path) == []
    return path


def test_every_variant_answers_the_same_documents_in_the_same_batches(finished: Path) -> None:
    batches: dict[str, dict[int, list[str]]] = {}
    for record in read_samples(finished):
        batches.setdefault(record["variant"], {}).setdefault(record["batch"], []).append(record["doc_id"])
    assert list(batches) == ["baseline", *VARIANTS]
    assert all(dealt == batches["baseline"] for dealt in batches.values())
    assert sum(map(len, batches["baseline"].values())) > 4


def test_identity_answers_like_the_baseline_and_a_reduction_does_not(finished: Path) -> None:
    texts = _texts(finished)
    docs = [doc for variant, doc in texts if variant == "baseline"]
    assert all(texts["same", doc] == texts["baseline", doc] for doc in docs)
    assert any(texts["few", doc] != texts["baseline", doc] for doc in docs)


def test_costs_are_those_of_the_patch(finished: Path) -> None:
    by_variant = {record["variant"]: record for record in read_samples(finished)}
    assert by_variant["baseline"]["visual_kept"] == by_variant["same"]["visual_kept"] == [64] * 8
    assert by_variant["few"]["visual_kept"] == by_variant["both"]["visual_kept"] == [16] * 8
    few, full = by_variant["few"], by_variant["baseline"]
    # Keys and values, 8 layers of width 192, float32, 48 tokens less in each of the batch's rows.
    assert sum(full["batch_kv_bytes"]) - sum(few["batch_kv_bytes"]) == full["batch_size"] * 48 * 8 * 2 * 192 * 4
    assert few["batch_prefill_flops"] < full["batch_prefill_flops"] == by_variant["same"]["batch_prefill_flops"]
    costs = score_run(finished)["tasks"]["scenes-vqa"]["variants"]["few"]["cost"]
    assert costs["visual_kept"] == 16
    assert costs["relative"]["prefill_flops"] < 0.5


def test_the_folder_says_what_was_run(finished: Path) -> None:
    environment = json.loads((finished / "env.json").read_text())
    assert environment["model"]["dtype"] == "float32"
    assert environment["model"]["revision"].startswith("fingerprint:")
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["data"]["scenes-vqa"]["revision"] == get_task("scenes-vqa").source().revision
    assert "all patches removed" in environment["self_test"]
    assert [each["id"] for each in environment["methods"]["both"]] == ["fastervlm", "var"]
    assert environment["methods"]["few"][0]["settings"]["keep"] == 16
    assert environment["finished"] >= environment["started"]


def test_resuming_a_finished_run_asks_nothing(
    finished: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "samples.jsonl").read_bytes()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(Generator, "ask", never)
    monkeypatch.setattr(runner_module.Runner, "_self_test", lambda *_: [])
    assert run(_recipe(model_folder), finished, resume=True) == []
    assert (finished / "samples.jsonl").read_bytes() == before


def test_resuming_half_a_run_gives_the_same_answers(finished: Path, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "half"
    path.mkdir()
    lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    (path / "samples.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:40])
    assert run(_recipe(model_folder), path, resume=True) == []
    assert _texts(path) == _texts(finished)
    assert len(read_samples(path)) == len(lines)


def test_batch_size_does_not_change_answers(finished: Path, model_folder: Path, tmp_path: Path) -> None:
    run(_recipe(model_folder, batch_size=1, variants={"few": VARIANTS["few"]}), tmp_path)
    texts = _texts(finished)
    assert _texts(tmp_path) == {key: texts[key] for key in texts if key[0] in ("baseline", "few")}


def test_sampling_depends_on_the_seed_and_the_document_only(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [{"name": "scenes-vqa", "generation": {"max_new_tokens": 3, "do_sample": True}}]

    def sampled(name: str, docs: slice, **changes: Any) -> dict[tuple[str, str], str]:
        monkeypatch.setattr(runner_module, "select", lambda task, all_docs, limit, seed: list(all_docs[docs]))
        run(_recipe(model_folder, tasks=tasks, variants={}, self_test=0, **changes), tmp_path / name)
        return _texts(tmp_path / name)

    state = torch.random.get_rng_state()
    first = sampled("a", slice(0, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sampled("b", slice(0, 6), batch_size=2) == first
    assert first.items() <= sampled("c", slice(0, 9)).items()
    other = sampled("d", slice(0, 6), seed=1)
    assert other.keys() == first.keys()
    assert other != first


def _swap(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    monkeypatch.setattr(runner_module, "open_task", lambda plan: task)
    monkeypatch.setattr("lmmhooks_eval.score.open_task", lambda plan: task)


def _made_up(folder: Path) -> Task:
    (folder / "good.png").parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (112, 112), "red").save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:60])
    docs = [
        {"id": name, "group": name, "label": "yes", "image": image, "question": question}
        for name, image, question in [
            ("fine", "good.png", "Is it red?"),
            ("undecodable", "bad.png", "Is it red?"),
            ("missing", "none.png", "Is it red?"),
            ("silent", "good.png", ""),
            ("also-fine", "good.png", "Is it blue?"),
        ]
    ]
    return make_task(folder, load=lambda: docs)


def test_documents_that_cannot_be_asked_do_not_stop_the_others(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _swap(monkeypatch, _made_up(tmp_path / "images"))
    recipe = _recipe(model_folder, tasks=["made-up"], variants={"same": VARIANTS["same"]})
    failures = run(recipe, tmp_path / "run")
    assert len(failures) == 3
    assert all("\n" not in line for line in failures)
    records = read_samples(tmp_path / "run")
    assert {record["doc_id"] for record in records if "text" in record} == {"fine", "also-fine"}
    assert {record["doc_id"] for record in records if "error" in record} == {"undecodable", "missing", "silent"}
    scored = score_run(tmp_path / "run")
    assert scored["tasks"]["made-up"]["variants"]["same"]["failed"] == 3
    assert len(scored["problems"]) == 2  # one line each for the baseline and the variant


def _failing_ask(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    original = Generator.ask

    def ask(self: Generator, prompts: Sequence[str], *rest: Any) -> Any:
        if (error := fails(prompts)) is not None:
            raise error
        return original(self, prompts, *rest)

    monkeypatch.setattr(Generator, "ask", ask)


def test_out_of_memory_halves_the_batch_and_is_recorded(
    finished: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing_ask(
        monkeypatch, lambda prompts: torch.OutOfMemoryError("CUDA out of memory") if len(prompts) > 2 else None
    )
    recipe = _recipe(model_folder, variants={"few": VARIANTS["few"]})
    assert run(recipe, tmp_path) == []
    assert max(record["batch_size"] for record in read_samples(tmp_path)) == 2
    assert "out of memory with a batch of 4" in json.loads((tmp_path / "env.json").read_text())["memory_events"][0]
    texts = _texts(finished)
    assert _texts(tmp_path) == {key: texts[key] for key in texts if key[0] in ("baseline", "few")}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("out of memory, tried to allocate"), "out of memory with a batch of one: "),
        (PromptError("row 2 has 63 image tokens"), "row 2 has 63 image tokens"),
    ],
)
def test_a_document_that_cannot_be_answered_fails_alone(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    monkeypatch.setattr(runner_module, "select", lambda task, docs, limit, seed: list(docs[:6]))
    victim = get_task("scenes-vqa").load()[2]
    _failing_ask(monkeypatch, lambda prompts: error if any(victim["question"] in each for each in prompts) else None)
    failures = run(_recipe(model_folder, variants={}, self_test=0), tmp_path)
    assert len(failures) == 1
    assert failures[0].startswith(reason)
    assert len(_texts(tmp_path)) == 5
    assert [record["doc_id"] for record in read_samples(tmp_path) if "error" in record] == [victim["id"]]


def test_other_errors_are_not_swallowed(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing_ask(monkeypatch, lambda prompts: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(_recipe(model_folder, variants={}), tmp_path)


def test_a_variant_that_cannot_run_is_refused_before_anything_is_asked(model_folder: Path, tmp_path: Path) -> None:
    recipe = _recipe(model_folder, variants={"twice": ["fastervlm(keep=16)", "random(keep=16)"]})
    with pytest.raises(MethodError):
        run(recipe, tmp_path)
    assert read_samples(tmp_path) == []


def test_a_processor_setting_that_does_not_exist_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no setting 'do_resze'; did you mean 'do_resize'"):
        run(_recipe(model_folder, processor={"do_resze": True}), tmp_path)


def test_processor_settings_reach_the_pixels_and_the_key(finished: Path, model_folder: Path, tmp_path: Path) -> None:
    run(_recipe(model_folder, variants={}, self_test=0, processor={"do_normalize": False}), tmp_path)
    plain = {record["doc_id"]: record for record in read_samples(finished) if record["variant"] == "baseline"}
    changed = {record["doc_id"]: record for record in read_samples(tmp_path)}
    assert all(changed[doc]["key"] != plain[doc]["key"] for doc in changed)
    assert any(changed[doc]["text"] != plain[doc]["text"] for doc in changed)
