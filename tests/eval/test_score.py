"""Scoring run folders that were written without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmmhooks_eval import stats
from lmmhooks_eval.score import score_run
from tests.eval.runs import answer, documents, opposite, perfect, write_run


def _variant(path: Path, variant: str = "v") -> dict:
    return score_run(path)["tasks"]["scenes-pope"]["variants"][variant]


def test_value_difference_and_flips(tmp_path: Path) -> None:
    docs = documents()
    baseline = [answer(doc, "baseline", perfect(doc) if i >= 6 else opposite(doc)) for i, doc in enumerate(docs)]
    patched = [answer(doc, "v", perfect(doc) if i not in (0, 1, 20) else opposite(doc)) for i, doc in enumerate(docs)]
    figures = _variant(write_run(tmp_path, baseline + patched))
    assert figures["n"] == 36
    assert [figures["flips"][name] for name in ("fixed", "broken", "both_right", "both_wrong")] == [4, 1, 29, 2]
    assert figures["flips"]["fixed_ids"] == [doc["id"] for doc in docs[2:6]]
    assert figures["flips"]["broken_ids"] == [docs[20]["id"]]
    assert figures["changed_texts"] == 5
    assert figures["test"]["p"] == pytest.approx(stats.mcnemar(4, 1))
    estimate = figures["metrics"]["accuracy"]
    assert estimate["difference"] == pytest.approx(estimate["value"] - estimate["baseline"])
    low, high = estimate["difference_interval"]
    assert low <= estimate["difference"] <= high
    assert (tmp_path / "metrics.json").exists()


def test_an_identical_variant_has_no_difference(tmp_path: Path) -> None:
    docs = documents()
    records = [answer(doc, variant, opposite(doc)) for variant in ("baseline", "v") for doc in docs]
    figures = _variant(write_run(tmp_path, records))
    assert figures["metrics"]["accuracy"]["difference_interval"] == [0.0, 0.0]
    assert figures["test"]["p"] == figures["test"]["p_holm"] == 1.0
    assert figures["detectable_change"] is None


def test_scores_come_from_the_text_not_from_the_line(tmp_path: Path) -> None:
    docs = documents(number=6)
    records = [{**answer(doc, "baseline", perfect(doc)), "parsed": "maybe", "score": {"correct": 0.0}} for doc in docs]
    figures = _variant(write_run(tmp_path, records, variants={}), "baseline")
    assert figures["metrics"]["accuracy"]["value"] == 1.0


def test_another_parser_needs_no_new_answers(tmp_path: Path) -> None:
    docs = [doc for doc in documents() if doc["label"] == "no"]
    records = [answer(doc, "baseline", "NO") for doc in docs]  # a yes to the official parser
    official = _variant(write_run(tmp_path / "a", records, variants={}), "baseline")
    tasks = [{"name": "scenes-pope", "parser": "opera"}]
    opera = _variant(write_run(tmp_path / "b", records, variants={}, tasks=tasks), "baseline")
    assert [figures["metrics"]["accuracy"]["value"] for figures in (official, opera)] == [0.0, 1.0]


def test_wilson_for_independent_documents_bootstrap_for_clusters(tmp_path: Path) -> None:
    captions = documents("scenes-caption", 10)
    records = [answer(doc, "baseline", "a cup", task="scenes-caption") for doc in captions]
    recipe = {"variants": {}, "tasks": [{"name": "scenes-caption"}]}
    metrics = score_run(write_run(tmp_path / "a", records, **recipe))["tasks"]["scenes-caption"]["variants"]["baseline"]
    wrong = sum("cup" not in doc["objects"] for doc in captions)
    assert metrics["metrics"]["chair_s"]["interval_method"] == "wilson"
    assert metrics["metrics"]["chair_s"]["interval"] == pytest.approx(list(stats.wilson(wrong, 10)))
    assert metrics["metrics"]["recall"]["interval_method"] == "cluster-bootstrap"
    records = [answer(doc, "baseline", "Yes") for doc in documents()]
    figures = _variant(write_run(tmp_path / "b", records, variants={}), "baseline")
    assert figures["metrics"]["accuracy"]["interval_method"] == "cluster-bootstrap"


def test_a_hallucination_less_is_a_document_fixed(tmp_path: Path) -> None:
    doc = next(doc for doc in documents("scenes-caption", 40) if "cup" not in doc["objects"])
    records = [answer(doc, "baseline", "a cup", task="scenes-caption"), answer(doc, "v", "", task="scenes-caption")]
    scored = score_run(write_run(tmp_path, records, tasks=[{"name": "scenes-caption"}]))
    assert scored["tasks"]["scenes-caption"]["variants"]["v"]["flips"]["fixed_ids"] == [doc["id"]]


def test_holm_runs_over_all_comparisons_of_the_run(tmp_path: Path) -> None:
    docs = documents()
    texts = {"baseline": opposite, "v": perfect, "w": opposite}
    records = [answer(doc, variant, text(doc)) for variant, text in texts.items() for doc in docs]
    scored = score_run(write_run(tmp_path, records, variants={"v": ["var"], "w": ["vcd"]}))
    assert scored["statistics"]["family_size"] == 2
    test = scored["tasks"]["scenes-pope"]["variants"]["v"]["test"]
    assert test["p_holm"] == pytest.approx(2 * test["p"])


def test_failed_and_unpaired_documents_are_problems(tmp_path: Path) -> None:
    docs = documents(number=6)
    broken = {key: value for key, value in answer(docs[0], "v", "").items() if key not in ("text", "batch")}
    records = [answer(doc, "baseline", "Yes") for doc in docs]
    records += [answer(doc, "v", "Yes") for doc in docs[1:]] + [{**broken, "error": "image is gone"}]
    scored = score_run(write_run(tmp_path, records))
    figures = scored["tasks"]["scenes-pope"]["variants"]["v"]
    assert (figures["n"], figures["failed"], figures["unpaired"]) == (5, 1, 1)
    assert any("1 failed, first" in line and "image is gone" in line for line in scored["problems"])
    assert any("not answered by both" in line for line in scored["problems"])


def test_a_document_that_succeeded_later_is_no_failure(tmp_path: Path) -> None:
    doc = documents(number=1)[0]
    failed = {**answer(doc, "baseline", ""), "error": "gone", "key": "other"}
    scored = score_run(write_run(tmp_path, [failed, answer(doc, "baseline", perfect(doc))], variants={}))
    assert scored["problems"] == []
    assert scored["tasks"]["scenes-pope"]["variants"]["baseline"]["failed"] == 0


def test_too_many_unparsed_answers_are_a_problem(tmp_path: Path) -> None:
    records = [answer(doc, "baseline", "Perhaps") for doc in documents(number=6)]
    scored = score_run(write_run(tmp_path, records, variants={}, max_unparsed=0.5))
    assert scored["problems"] == ["scenes-pope, baseline: 6 of 6 answers could not be parsed"]


def test_an_empty_run_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    scored = score_run(write_run(tmp_path, []))
    assert scored["problems"] == ["scenes-pope, baseline: no answers", "scenes-pope, v: no answers"]
    json.dumps(scored, allow_nan=False)


def test_scoring_needs_no_model_library(tmp_path: Path) -> None:
    write_run(tmp_path, [answer(doc, "baseline", "Yes") for doc in documents(number=6)], variants={})
    code = (
        "import sys; from pathlib import Path; from lmmhooks_eval.score import score_run; "
        "score_run(Path(sys.argv[1])); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
