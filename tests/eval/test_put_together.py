"""Methods that put one answer together from several generations, in runs of a real (untrained) model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lmmhooks
from lmmhooks.errors import PromptError
from lmmhooks.methods.decoding.mvp import Mvp
from lmmhooks.prompting import Prompter
from lmmhooks_eval import runner as runner_module
from lmmhooks_eval.loading import load_model
from lmmhooks_eval.recipes import build
from lmmhooks_eval.runner import run
from lmmhooks_eval.score import score_run
from lmmhooks_eval.store import read_samples
from lmmhooks_eval.tasks import get_task

MVP = "mvp(caption_tokens=3, path_tokens=2, topk=2, threshold=0.0)"
TOKENS = 64  # visual tokens of an image of the bundled scenes


def _recipe(model: Path, **changes: Any) -> Any:
    settings = {
        "name": "test",
        "model": str(model),
        "dtype": "float32",
        "tasks": [{"name": "scenes-vqa", "generation": {"max_new_tokens": 3}}],
        "variants": {"mvp": [MVP], "few": ["fastervlm(keep=16)", MVP]},
        "batch_size": 4,
        "self_test": 2,
        "max_unparsed": 1.0,
        "statistics": {"draws": 100},
    }
    return build({**settings, **changes}, "test")


def _by_variant(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in read_samples(path):
        found.setdefault(record["variant"], {})[record["doc_id"]] = record
    return found


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(_recipe(model_folder))


@pytest.fixture(autouse=True)
def _short(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One model for all runs of this file, and five documents."""
    monkeypatch.setattr(runner_module, "load_model", lambda recipe: loaded)
    monkeypatch.setattr(runner_module, "select", lambda task, docs, limit, seed: list(docs[:5]))


@pytest.fixture(scope="module")
def finished(model_folder: Path, loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(runner_module, "load_model", lambda recipe: loaded)
        monkey.setattr(runner_module, "select", lambda task, docs, limit, seed: list(docs[:5]))
        assert run(_recipe(model_folder), path) == []
    return path


def test_it_answers_the_documents_of_the_baseline_in_its_batches(finished: Path) -> None:
    records = _by_variant(finished)
    batches = {variant: {doc: row["batch"] for doc, row in rows.items()} for variant, rows in records.items()}
    assert batches["mvp"] == batches["few"] == batches["baseline"]
    assert {row["text"] for row in records["mvp"].values()} <= {"Yes", "No"}
    scored = score_run(finished)["tasks"]["scenes-vqa"]["variants"]["mvp"]
    assert scored["failed"] == 0
    assert scored["test"]["name"] == "mcnemar-exact"


def test_a_record_counts_every_generation(finished: Path) -> None:
    records = _by_variant(finished)
    images = set()
    for doc, row in records["mvp"].items():
        # Three captions unless the image is known, three first tokens, and at most two paths for each.
        fresh = row["cluster"] not in images
        images.add(row["cluster"])
        rows = row["visual_tokens"] // TOKENS
        assert row["visual_tokens"] % TOKENS == 0
        assert (6 if fresh else 3) < rows <= (12 if fresh else 9), doc
        assert row["passes"] == (3 if fresh else 2)
        assert row["visual_kept"] == [row["visual_tokens"]] * 8
        assert row["new_tokens"] >= rows
        assert row["batch_prefill_ms"] > 0
        assert row["batch_preprocess_ms"] > 0
        assert row["batch_kv_bytes"][0] > records["baseline"][doc]["batch_kv_bytes"][0]
        few = records["few"][doc]
        assert few["visual_kept"] == [few["visual_tokens"] // 4] * 8
        assert few["batch_prefill_flops"] < row["batch_prefill_flops"]
        assert "passes" not in records["baseline"][doc]


def test_answers_are_those_of_the_patch_alone(finished: Path, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    task = get_task("scenes-vqa")
    with lmmhooks.wrap(model, MVP, processor=processor) as patch:
        for doc, row in _by_variant(finished)["mvp"].items():
            text = patch.answer(list(task.images(row["doc"])), task.question(row["doc"]), max_new_tokens=3)
            assert text == row["text"], doc


def test_half_a_run_goes_on(finished: Path, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "half"
    path.mkdir()
    lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    (path / "samples.jsonl").write_bytes(b"".join(lines[:8]))
    assert run(_recipe(model_folder), path, resume=True) == []
    texts = {variant: {doc: row["text"] for doc, row in rows.items()} for variant, rows in _by_variant(path).items()}
    for variant, rows in _by_variant(finished).items():
        assert texts[variant] == {doc: row["text"] for doc, row in rows.items()}


def _verbatim(self: Mvp, ask: Any, image: Any, prompt: str, **generation: Any) -> str:
    return str(ask(image, [prompt], max_new_tokens=generation["max_new_tokens"])[0].text)


def test_a_question_asked_as_it_is_gets_the_prompt_of_every_other_variant(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    batch = Prompter.batch

    def watched(self: Prompter, prompts: Any, images: Any) -> Any:
        seen.extend(prompts)
        return batch(self, prompts, images)

    monkeypatch.setattr(Mvp, "answer", _verbatim)
    monkeypatch.setattr(Prompter, "batch", watched)
    task = {"name": "scenes-vqa", "prompt": "llava", "generation": {"max_new_tokens": 3}}
    changes = {"tasks": [task], "system": "Be brief.", "pad_to_square": True, "processor": {"do_normalize": False}}
    run(_recipe(model_folder, **changes, variants={"mvp": [MVP]}, self_test=0), tmp_path)
    records = _by_variant(tmp_path)
    prompts = [row["prompt"] for row in records["baseline"].values()]
    assert all("Be brief." in prompt and "single word or phrase" in prompt for prompt in prompts)
    assert sorted(seen) == sorted(prompts * 2)
    assert {d: r["text"] for d, r in records["mvp"].items()} == {d: r["text"] for d, r in records["baseline"].items()}


def test_a_document_that_fails_does_not_stop_the_others(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = get_task("scenes-vqa").load()[2]

    def fails(self: Mvp, ask: Any, image: Any, prompt: str, **generation: Any) -> str:
        if prompt == get_task("scenes-vqa").question(victim):
            raise PromptError("this one cannot be asked")
        return _verbatim(self, ask, image, prompt, **generation)

    monkeypatch.setattr(Mvp, "answer", fails)
    failures = run(_recipe(model_folder, variants={"mvp": [MVP]}, self_test=0), tmp_path)
    assert failures == ["this one cannot be asked"]
    rows = _by_variant(tmp_path)["mvp"]
    assert [doc for doc, row in rows.items() if "error" in row] == [victim["id"]]
    assert len(rows) == 5


def test_sampling_depends_on_the_document_only(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(self: Mvp, ask: Any, image: Any, prompt: str, **generation: Any) -> str:
        return str(torch.rand(()).item())

    monkeypatch.setattr(Mvp, "answer", drawn)
    # A method that asked nothing read nothing either: what is stored of the cost is not looked at here.
    state = torch.random.get_rng_state()
    for size in (1, 4):
        run(_recipe(model_folder, variants={"mvp": [MVP]}, self_test=0, batch_size=size), tmp_path / str(size))
    assert torch.equal(torch.random.get_rng_state(), state)
    texts = [{d: r["text"] for d, r in _by_variant(tmp_path / size)["mvp"].items()} for size in ("1", "4")]
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) == 5


def test_compare_shows_it_beside_methods_that_generate(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    task = get_task("scenes-vqa")
    doc = task.load()[0]
    image = task.images(doc)[0]
    comparison = lmmhooks.compare(model, processor, image, task.question(doc), [MVP, "var(sink_dims='any')"])
    base, mvp, var = comparison.runs
    assert (base.passes, mvp.passes, var.passes) == (1, 3, 1)
    assert mvp.text in ("Yes", "No")
    assert mvp.stats.prefill_flops > 6 * base.stats.prefill_flops
    assert mvp.total_ms > 0
    page = comparison.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "several generations" in page


def test_only_methods_that_have_to_be_told_where_to_look_are_told(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[Any]] = {}
    original = lmmhooks.Patch.answer

    def answer(self: Any, image: Any, prompt: str, **kwargs: Any) -> str:
        told.setdefault(self.methods[0].id, []).append(kwargs.get("region"))
        return original(self, image, prompt, **kwargs)

    monkeypatch.setattr(lmmhooks.Patch, "answer", answer)
    variants = {"oracle": "oracle-crop", "centre": "centre-crop"}
    tasks = [{"name": "scenes-small", "generation": {"max_new_tokens": 2}}]
    assert run(_recipe(model_folder, tasks=tasks, variants=variants, self_test=0), tmp_path / "told") == []
    task = get_task("scenes-small")
    assert task.region is not None
    # Batches ask documents in an order of their own.
    assert sorted(told.pop("oracle-crop")) == sorted(task.region(doc) for doc in task.load()[:5])
    assert told == {"centre-crop": [None] * 5}
