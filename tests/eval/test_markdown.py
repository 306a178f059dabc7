"""Results pages: written by rule from a run, so that they claim what it shows and no more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmmhooks_eval.report.markdown import condensed, results
from lmmhooks_eval.score import score_run
from tests.eval.runs import answer, documents, opposite, perfect, write_run

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "model": {"dtype": "float32", "attention": "sdpa"},
    "device_name": "A processor",
    "dirty": False,
    "commit": "0123456789abcdef",
    "started": "2026-01-02T03:04:05+00:00",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Half of the baseline right; `up` all, `down` none, `same` word for word the baseline."""
    docs = documents()
    half = [opposite(doc) if index % 2 else perfect(doc) for index, doc in enumerate(docs)]
    records = [answer(doc, "baseline", text) for doc, text in zip(docs, half, strict=True)]
    records += [answer(doc, "same", text) for doc, text in zip(docs, half, strict=True)]
    records += [answer(doc, "up", perfect(doc)) for doc in docs] + [answer(doc, "down", opposite(doc)) for doc in docs]
    return write_run(tmp_path / "run", records, variants={"up": ["var"], "down": ["vcd"], "same": ["fastv"]})


def record(run: Path) -> dict[str, Any]:
    return json.loads(json.dumps(condensed(score_run(run), ENVIRONMENT)))


def test_the_reading_names_what_is_sure_in_either_direction(run: Path) -> None:
    text = results(record(run), "a.json")
    assert "Of 3 methods, at 5 % after Holm's correction: better than the baseline `up`, worse `down`." in text
    assert "Not one answer was changed by `same`." in text


def test_where_less_is_better_less_is_called_better(run: Path) -> None:
    data = record(run)
    data["metrics"]["tasks"]["scenes-pope"]["metrics"]["accuracy"]["better"] = "lower"
    assert "better than the baseline `down`, worse `up`." in results(data, "a.json")


def test_an_uncorrected_p_is_not_enough(run: Path) -> None:
    data = record(run)
    for figures in data["metrics"]["tasks"]["scenes-pope"]["variants"].values():
        figures["test"] |= {"p": 0.01, "p_holm": 0.06}
    assert "better than the baseline none, worse none." in results(data, "a.json")


def test_tables_hold_every_variant_with_the_metrics_that_belong_beside(run: Path) -> None:
    text = results(record(run), "a.json")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert [re.match(r"\| `(\w+)`", line)[1] for line in rows[2:]] == ["baseline", "up", "down", "same"]
    assert rows[0].endswith("| recall | precision | f1 | yes_ratio |")
    bold = {re.match(r"\| `(\w+)`", line)[1] for line in rows[2:] if "**" in line}
    assert bold == {"up", "down"}


def test_the_setting_says_where_and_with_what(run: Path) -> None:
    first = results(record(run), "a.json").splitlines()
    assert first[0] == "## tiny-llava"
    assert first[2] == (
        "A processor, float32, sdpa, torch 2.13.0, transformers 5.23.0, commit 01234567, 2026-01-02. [a.json](a.json)"
    )


def test_lists_of_documents_are_left_out(run: Path) -> None:
    flips = record(run)["metrics"]["tasks"]["scenes-pope"]["variants"]["up"]["flips"]
    assert flips["fixed"] == 18
    assert not any(key.endswith("_ids") for key in flips)


def test_the_script_stores_a_run_and_refuses_one_with_problems(run: Path, tmp_path: Path) -> None:
    def store(folder: Path) -> subprocess.CompletedProcess[str]:
        (folder / "env.json").write_text(json.dumps(ENVIRONMENT))
        command = [sys.executable, str(ROOT / "scripts" / "store_results.py"), str(folder), "--out"]
        return subprocess.run([*command, str(tmp_path / "out" / "a.json")], capture_output=True, text=True, check=False)

    assert store(run).returncode == 0
    assert json.loads((tmp_path / "out" / "a.json").read_text())["kind"] == "results"
    docs = documents()
    partial = write_run(tmp_path / "partial", [answer(doc, "baseline", perfect(doc)) for doc in docs])
    refused = store(partial)
    assert refused.returncode == 1
    assert "must not be published: scenes-pope, v: no answers" in refused.stderr
