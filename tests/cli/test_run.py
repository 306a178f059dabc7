"""``lmmhooks run``, ``score`` and ``report`` as users call them, down to ``kill -9``."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lmmhooks_eval.store import read_samples
from tests.cli.invoke import invoke
from tests.eval.untrained import export_untrained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_untrained(tmp_path_factory.mktemp("untrained") / "tiny-llava")


def _recipe(folder: Path, model: Path, **changes: Any) -> Path:
    data = {
        "name": "small",
        "model": str(model),
        "dtype": "float32",
        "tasks": [{"name": "scenes-vqa", "limit": 9, "generation": {"max_new_tokens": 2}}],
        "variants": {"few": "fastervlm(keep=16)"},
        "batch_size": 4,
        "self_test": 2,
        "max_unparsed": 1.0,
        "statistics": {"draws": 100},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}), encoding="utf-8")
    return path


def _command(*arguments: str | Path, path: str = "", **options: Any) -> subprocess.Popen[str]:
    search = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "eval"), path]))
    return subprocess.Popen(
        [sys.executable, "-m", "lmmhooks.cli.app", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        **options,
    )


def _last_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    return stderr.rstrip().splitlines()[-1]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    process = _command("run", _recipe(folder, model), "--out", folder / "out", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder / "out", json.loads(out)


def test_a_run_fills_its_folder_and_prints_json_only(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "env.json", "metrics.json", "report.html", "samples.jsonl",
    ]  # fmt: skip
    variants = printed["tasks"]["scenes-vqa"]["variants"]
    assert list(variants) == ["baseline", "few"]
    for figures in variants.values():
        low, high = figures["metrics"]["accuracy"]["interval"]
        assert 0 <= low <= figures["metrics"]["accuracy"]["value"] <= high <= 1
    assert len(variants["few"]["metrics"]["accuracy"]["difference_interval"]) == 2
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored == {key: value for key, value in printed.items() if key not in ("run", "report")}


def test_the_folders_config_runs_again(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, printed = finished
    outcome = invoke("run", str(folder / "config.yaml"), "--out", str(tmp_path / "again"), "--json")
    assert outcome.status == 0, outcome.err
    again = json.loads(outcome.out)["tasks"]["scenes-vqa"]["variants"]["few"]
    assert again["metrics"] == printed["tasks"]["scenes-vqa"]["variants"]["few"]["metrics"]


def test_score_and_report_need_only_the_folder(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, printed = finished
    scored = invoke("score", str(folder), "--json")
    assert scored.status == 0
    assert json.loads(scored.out)["tasks"] == printed["tasks"]
    assert "scenes-vqa" in invoke("score", str(folder)).out
    page = tmp_path / "page.html"
    reported = invoke("report", str(folder), str(folder), "--html", str(page))
    assert reported.status == 0
    assert "No method is claimed to help" in reported.out
    assert page.read_text().count("<h1>") == 2
    assert json.loads(invoke("report", str(folder), "--json").out)["report"] == str(folder / "report.html")


def test_a_second_run_into_the_folder_is_refused(
    finished: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    folder, _ = finished
    recipe = _recipe(tmp_path, model)
    before = (folder / "samples.jsonl").read_bytes()
    assert "already holds a run" in _bad(invoke("run", str(recipe), "--out", str(folder)))
    changed = invoke("run", str(recipe), "--out", str(folder), "--resume", "--set", "variants.few=fastervlm(keep=8)")
    assert "variants.few.0.fastervlm.keep: 16 -> 8" in _bad(changed)
    assert (folder / "samples.jsonl").read_bytes() == before


def _bad(outcome: Any) -> str:
    assert outcome.status == 2, outcome.err
    assert outcome.out == ""
    return _last_line(outcome.err)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--set", "variants.few=fastervlm(kep=4)"], ["variant 'few'", "kep", "did you mean 'keep'"]),
        (["--set", "variants.few=fastervlm(keep=-1)"], ["variant 'few'", "keep=-1", "must be"]),
        (["--set", "variants.few=fasterlvm"], ["unknown method 'fasterlvm'", "did you mean 'fastervlm'"]),
        (["--set", "batchsize=4"], ["unknown key 'batchsize'", "did you mean 'batch_size'"]),
        (["--set", "tasks.0.name=scenes-poop"], ["unknown task 'scenes-poop'", "did you mean 'scenes-pope'"]),
        (["--set", "tasks.0.prompt=lava"], ["no prompt 'lava'", "did you mean 'llava'"]),
        (["--set", "model=tiny-lava"], ["no model 'tiny-lava'", "did you mean 'tiny-llava'"]),
        (["--set", "model=/no/such/folder"], ["no model '/no/such/folder'"]),
        (["--limit", "0"], ["--limit", "greater than or equal to 1"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    model: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    line = _bad(invoke("run", str(_recipe(tmp_path, model)), "--out", str(tmp_path / "out"), *arguments))
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_bad_input(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = _bad(invoke("run", str(_recipe(tmp_path, model)), "--out", str(tmp_path / "file" / "out")))
    assert "cannot be written" in line
    assert "--out" in line


@pytest.mark.parametrize("command", ["score", "report"])
def test_a_folder_without_a_run_is_bad_input(command: str, tmp_path: Path) -> None:
    assert "is not a run folder" in _bad(invoke(command, str(tmp_path)))


def test_resume_without_a_run_is_bad_input(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no run of 'small' to resume" in _bad(invoke("run", str(_recipe(tmp_path, model)), "--resume"))


def _long_recipe(folder: Path, model: Path) -> Path:
    task = {"name": "scenes-vqa", "limit": 200, "generation": {"max_new_tokens": 2}}
    return _recipe(folder, model, tasks=[task], batch_size=2, self_test=0)


def _wait_for_answers(path: Path, process: subprocess.Popen[str], number: int) -> None:
    deadline = time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_in_the_middle_and_resumed(model: Path, tmp_path: Path) -> None:
    recipe, out = _long_recipe(tmp_path, model), tmp_path / "out"
    process = _command("run", recipe, "--out", out)
    _wait_for_answers(out / "samples.jsonl", process, 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = read_samples(out)
    assert len(kept) >= 6
    outcome = invoke("run", str(recipe), "--out", str(out), "--resume", "--set", "batch_size=16", "--json")
    assert outcome.status == 0, outcome.err
    after = read_samples(out)
    assert after[: len(kept)] == kept
    assert len({record["key"] for record in after}) == len(after)
    figures = json.loads(outcome.out)["tasks"]["scenes-vqa"]["variants"]
    assert figures["few"]["n"] == figures["baseline"]["n"] == len(after) / 2


def test_interrupted_says_so_and_keeps_answers(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A process started in the background of a script inherits that interrupts are ignored.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = _command("run", _long_recipe(tmp_path, model), "--out", out, preexec_fn=listening)
    _wait_for_answers(out / "samples.jsonl", process, 2)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "interrupted" in _last_line(stderr)
    assert "--resume" in _last_line(stderr)
    assert len(read_samples(out)) >= 2


def test_a_disk_that_takes_no_more_fails_the_run_and_keeps_answers(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = 20_000  # bytes a file may have: room for some answers, not for all

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = _command("run", _long_recipe(tmp_path, model), "--out", out, preexec_fn=little_room)
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 1
    assert "earlier answers are kept" in _last_line(stderr)
    assert 0 < (out / "samples.jsonl").stat().st_size <= limit
    assert read_samples(out)
    assert (out / "samples.jsonl").read_bytes().endswith(b"\n")


PLUGIN = """
from PIL import Image
from lmmhooks_eval.metrics import yesno
from lmmhooks_eval.task import Source, Task

DOCS = [
    {{"id": name, "image": f"{folder}/{{name}}.png", "question": "Is it red?", "label": "yes"}}
    for name in ("good", "torn", "missing")
]
TASK = Task(
    name="red", title="Red", licence="none", source=lambda: Source("local", "memory"), load=lambda: DOCS,
    images=lambda doc: [Image.open(doc["image"])], prompts={{"bare": "{{question}}"}}, parsers=yesno.PARSERS,
    score=lambda verdict, doc: yesno.score(verdict, doc["label"], "random"),
    aggregate=lambda totals: yesno.aggregate(totals, ("random",)),
    metrics=yesno.metrics(("random",)), item_score="correct",
)
"""


def test_a_plug_ins_task_with_broken_images_fails_for_them_alone(model: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    information = site / "red_task-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: red-task\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[lmmhooks.tasks]\nred = red_task:TASK\nbad = no_such_module:TASK\n")
    (site / "red_task.py").write_text(PLUGIN.format(folder=tmp_path))
    Image.new("RGB", (112, 112), "red").save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])

    process = _command("run", _recipe(tmp_path, model, tasks=["red"]), "--out", tmp_path / "out", path=str(site))
    out, stderr = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "2 failed, first 'torn'" in _last_line(stderr)
    assert "few" in out
    texts = {record["doc_id"] for record in read_samples(tmp_path / "out") if "text" in record}
    assert texts == {"good"}

    process = _command("tasks", path=str(site))
    out, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "red" in out
    assert "entry point 'bad'" in _last_line(stderr)
