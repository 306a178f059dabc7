"""The results page of methods that look again: what they are held against, and what it may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.report.refinement import refinement_page, refinement_record
from lmmhooks_eval.tasks import get_task
from tests.eval.runs import answer, write_run
from tests.eval.test_markdown import ENVIRONMENT

DOCS = [dict(doc) for doc in get_task("scenes-small").load()[:320]]
VARIANTS = {
    "good": ["carve(read_layers=(4,))"],
    "same": ["attwarp"],
    "twice": ["same-image-twice"],
    "anywhere": ["random-crop"],
    "oracle": ["oracle-crop"],
}


def _lines() -> list[dict[str, Any]]:
    """The baseline is right on a third, controls on a third and a half, `good` on two thirds, the oracle always."""
    lines = []
    for index, doc in enumerate(DOCS):
        right = {
            "baseline": index % 3 == 0,
            "good": index % 3 != 1,
            "same": index % 3 == 0,
            "twice": index % 3 == 1,
            "anywhere": index % 2 == 0,
            "oracle": True,
        }
        for variant, is_right in right.items():
            line = answer(doc, variant, doc["answer"] if is_right else "nothing", task="scenes-small", batch=index)
            line |= {"batch_size": 1, "batch_prefill_ms": 20.0, "batch_preprocess_ms": 5.0, "batch_decode_ms": None}
            if variant == "good":
                line |= {"passes": 3, "visual_tokens": 256, "batch_prefill_ms": 70.0}
            lines.append(line)
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    return write_run(path, _lines(), tasks=[{"name": "scenes-small"}], variants=VARIANTS)


@pytest.fixture(scope="module")
def record(run: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(refinement_record(run, ENVIRONMENT), allow_nan=False))
    return made


def test_methods_are_held_against_the_best_control(record: dict[str, Any]) -> None:
    task = record["tasks"]["scenes-small"]
    assert task["best_control"] == "anywhere"
    found = task["variants"]
    roles = {name: figures["role"] for name, figures in found.items()}
    assert roles == {
        "baseline": "baseline",
        "good": "method",
        "same": "method",
        "twice": "control",
        "anywhere": "control",
        "oracle": "told",
    }
    assert {name for name, figures in found.items() if figures["against"]} == {"good", "same"}
    assert found["good"]["against"]["difference"] == pytest.approx(2 / 3 - 1 / 2, abs=0.01)
    assert found["same"]["difference"]["difference"] == 0.0
    # Holm's correction, written out, over the two methods that are held against the control.
    p = {name: found[name]["against"]["p"] for name in ("good", "same")}
    low, high = sorted(p, key=p.__getitem__)
    assert found[low]["against"]["p_holm"] == pytest.approx(min(2 * p[low], 1.0))
    assert found[high]["against"]["p_holm"] == pytest.approx(max(min(2 * p[low], 1.0), p[high]))


def test_costs_are_those_of_whole_answers(record: dict[str, Any]) -> None:
    found = record["tasks"]["scenes-small"]["variants"]
    assert [found["good"][name] for name in ("passes", "visual_tokens", "time")] == [3.0, 256.0, 3.0]
    assert [found["twice"][name] for name in ("passes", "visual_tokens", "time")] == [1.0, 64.0, 1.0]


def test_accuracy_stands_by_size(record: dict[str, Any]) -> None:
    task = record["tasks"]["scenes-small"]
    for size in ("tiny", "small", "medium", "large"):
        own = [index for index, doc in enumerate(DOCS) if doc["size"] == size]
        right = sum(index % 3 != 1 for index in own) / len(own)
        assert task["variants"]["good"]["groups"][f"{size}/accuracy"] == pytest.approx(right, abs=1e-12)


def test_the_page_says_who_beats_whom(record: dict[str, Any]) -> None:
    page = refinement_page(record, "refinement-tiny-llava.json")
    assert "- Of 2 methods, surely better than the untouched model: `good`; surely worse: none." in page
    assert "The best control is `anywhere` (50.0 %). Surely better than it: `good`; surely worse: `same`;" in page
    assert "not better as far as this run can tell: none." in page
    assert "Told where to look, `oracle` gains +66.6; the best method, `good`, gains +33" in page
    assert "| *`oracle`* | 100.0" in page
    assert "| accuracy % | tiny | small | medium | large | existence |" in page


def test_runs_without_such_methods_are_refused(tmp_path: Path) -> None:
    lines = [
        answer(doc, variant, doc["answer"], task="scenes-small") for doc in DOCS[:4] for variant in ("baseline", "v")
    ]
    path = write_run(tmp_path / "run", lines, tasks=[{"name": "scenes-small"}])
    with pytest.raises(RecipeError, match="has no method of kind refinement"):
        refinement_record(path, ENVIRONMENT)
