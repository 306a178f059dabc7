"""The results page of decoding methods: what it holds them against, over seeds, and what it may say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmmhooks_eval.bias import TUNED_OFFSET
from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.report.decoding import decoding_page, decoding_record
from lmmhooks_eval.tasks import get_task
from tests.eval.runs import answer, opposite, perfect, write_run
from tests.eval.test_markdown import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
DOCS = [dict(doc) for doc in get_task("scenes-pope").load()[:280:3]]
VARIANTS = {
    "good": ["vcd"],
    "bad": ["icd"],
    "same": ["ritual"],
    "yes": ["yes-offset(offset=9.0)"],
    "flipped": ["sign-flip(of='vcd')"],
}


def _said(doc: dict[str, Any], text: str) -> dict[str, Any]:
    return {"tokens": [5 if text == "Yes" else 6, 2], "margin": 1.0 if text == "Yes" else -1.0, "new_tokens": 2}


def _lines(seed: int) -> list[dict[str, Any]]:
    """A third of the baseline wrong, other ones under other seeds; `good` all right, `bad` all wrong."""
    lines = []
    for index, doc in enumerate(DOCS):
        base = opposite(doc) if index % 3 == seed % 3 else perfect(doc)
        texts = {"baseline": base, "good": perfect(doc), "bad": opposite(doc), "same": base, "yes": "Yes"}
        texts["flipped"] = opposite(doc)
        for variant, text in texts.items():
            line = {**answer(doc, variant, text), **_said(doc, text)}
            if variant == "baseline":
                line["gaps"] = [3.0, 1.0, 3.0, 3.0]
            elif variant == "good":
                line |= {"batch_cut": 0.5, "batch_branch_steps": 0.5}
            lines.append(line)
    return lines


def _run(path: Path, seed: int, **changes: Any) -> Path:
    write_run(path, _lines(seed), variants=VARIANTS, seed=seed, **changes)
    (path / "env.json").write_text(json.dumps(ENVIRONMENT))
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("runs") / "single", 0)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    sampled = {"do_sample": True, "temperature": 1.0}
    tasks = [{"name": "scenes-pope", "generation": sampled}]
    folder = tmp_path_factory.mktemp("runs")
    return [_run(folder / str(seed), seed, tasks=tasks, documents_seed=0) for seed in range(3)]


def _record(paths: list[Path]) -> dict[str, Any]:
    return json.loads(json.dumps(decoding_record(paths, ENVIRONMENT), allow_nan=False))


def test_methods_are_held_against_the_best_control(single: Path) -> None:
    task = _record([single])["tasks"]["scenes-pope"]
    controls = {name for name, figures in task["variants"].items() if figures["control"]}
    assert controls == {"yes", "flipped"}
    # Two thirds are right without any offset, and a constant Yes is right on half of them.
    assert task["best_control"] == TUNED_OFFSET
    found = {name: figures.get("against") for name, figures in task["variants"].items()}
    assert found["baseline"] is None
    assert found["yes"] is None
    assert found["good"]["difference"] == pytest.approx(1 / 3, abs=0.02)
    assert found["good"]["p_holm"] < 0.05
    assert found["bad"]["difference"] < 0
    assert found["same"]["p_holm"] == 1.0
    assert "_ids" not in json.dumps(task)


def test_the_page_says_who_beats_whom(single: Path) -> None:
    text = decoding_page(_record([single]), "a.json")
    assert text.startswith("## tiny-llava, greedy\n")
    assert "Seed 0. [a.json](a.json)" in text
    assert f"{len(DOCS)} documents about" in text
    assert "- Of 3 methods, surely better than the baseline: `good`; surely worse: `bad`." in text
    assert re.search(r"- Of 3 controls, surely better than the baseline: none; surely worse: .*`flipped`", text)
    line = "Surely better than it: `good`; surely worse: `bad`; not to be told from it: `same`."
    assert f"- The best control is `{TUNED_OFFSET}` (accuracy " in text
    assert line in text
    assert "better than the baseline: `good`; worse: `bad`." in text, "AUC"
    assert "- Not one answer was changed by `same`." in text
    assert "differ later under none." in text
    assert "- At 75.0 % of the baseline's steps one token alone passes a cut of 0.1" in text


def test_tables_are_whole_and_mark_controls(single: Path) -> None:
    text = decoding_page(_record([single]), "a.json")
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) == 2
    for rows in tables:
        assert len({row.count("|") for row in rows}) == 1
    first, second = tables
    names = [re.match(r"\| ([^|]*) \|", row)[1] for row in first[2:]]
    assert names == ["`baseline`", "`good`", "`bad`", "`same`", "*`yes`*", "*`flipped`*", f"*`{TUNED_OFFSET}`*"]
    assert "auc" in first[0]
    assert first[0].rstrip(" |").endswith("yes_ratio")
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in second[2:]}
    assert cells["`good`"][3:] == ["0.5", "100.0", "50.0"]
    assert cells["`same`"] == ["0.0", "0.0", "0.0", "(0.1)", "75.0", "-"]
    # One token of two differs wherever an answer does.
    assert float(cells["`bad`"][2]) == pytest.approx(float(cells["`bad`"][0]) / 2, abs=0.1)


def test_several_seeds_are_read_as_one(three: list[Path]) -> None:
    record = _record(three)
    assert record["seeds"] == [0, 1, 2]
    assert record["mode"] == "sampled at temperature 1"
    task = record["tasks"]["scenes-pope"]
    base = task["variants"]["baseline"]
    assert task["n"] == 3 * len(DOCS)
    assert len(base["by_seed"]) == 3
    # The documents are the same under all seeds, and so are their images.
    alone = _record(three[:1])["tasks"]["scenes-pope"]
    assert task["images"] == alone["images"]
    assert base["by_seed"][0] == alone["variants"]["baseline"]["metrics"]["accuracy"]["value"]
    good = task["variants"]["good"]
    assert good["test"]["name"] == "cluster-bootstrap"
    assert good["test"]["p_holm"] < 0.05
    assert good["flips"]["fixed"] == sum(1 for seed in range(3) for i in range(len(DOCS)) if i % 3 == seed)
    text = decoding_page(record, "a.json")
    assert f"{len(DOCS)} documents about {task['images']} images under each of 3 seeds." in text
    assert "by seed" in text
    low, high = (f"{100 * end(base['by_seed']):.1f}" for end in (min, max))
    assert f"- The baseline's accuracy lies between {low} and {high} over the seeds." in text


def test_where_less_is_better_the_least_is_the_best_control(tmp_path: Path) -> None:
    docs = [dict(doc) for doc in get_task("scenes-caption").load()[:40]]
    everything = [name for doc in docs for name in doc["objects"]]
    absent = {doc["id"]: next(name for name in everything if name not in doc["objects"]) for doc in docs}

    def told(doc: dict[str, Any], variant: str, wrong: bool) -> dict[str, Any]:
        text = f"A {doc['objects'][0]}" + (f" and a {absent[doc['id']]}." if wrong else ".")
        return answer(doc, variant, text, task="scenes-caption")

    lines = [told(doc, "baseline", index % 2 == 0) for index, doc in enumerate(docs)]
    lines += [told(doc, "good", False) for doc in docs]
    lines += [told(doc, "flipped", True) for doc in docs]
    lines += [told(doc, "placebo", index % 2 == 0) for index, doc in enumerate(docs)]
    variants = {"good": ["vcd"], "flipped": ["sign-flip(of='vcd')"], "placebo": ["placebo-image(of='vcd')"]}
    path = write_run(tmp_path / "run", lines, variants=variants, tasks=[{"name": "scenes-caption"}])
    record = decoding_record([path], ENVIRONMENT)
    assert record["tasks"]["scenes-caption"]["best_control"] == "placebo"
    text = decoding_page(record, "a.json")
    assert "surely better than the baseline: `good`" in text
    assert "surely worse: `flipped`." in text
    assert "Surely better than it: `good`; surely worse: none" in text
    assert {"recall", "precision", "length"} <= set(re.findall(r"\w+", text.split("\n| --- |")[0]))


def test_runs_that_do_not_belong_together_are_refused(three: list[Path], single: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a seed each, got 0, 0"):
        decoding_record([three[0], single], ENVIRONMENT)
    other = _run(tmp_path / "other", 5)
    with pytest.raises(RecipeError, match="another recipe"):
        decoding_record([three[0], other], ENVIRONMENT)
    partial = write_run(tmp_path / "partial", _lines(0)[:61], variants=VARIANTS)
    with pytest.raises(RecipeError, match="must not be published"):
        decoding_record([partial], ENVIRONMENT)


def test_the_script_stores_seeds_together(three: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "store_results.py"), "--out", str(tmp_path / "a.json")]
    named = [str(path) for path in three]
    done = subprocess.run([*command, "--decoding", *named], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.json").read_text())["kind"] == "decoding"
    refused = subprocess.run([*command, *named], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--decoding" in refused.stderr
