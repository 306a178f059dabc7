"""``lmmhooks recipes`` and ``lmmhooks tasks``."""

from __future__ import annotations

import json
import subprocess
import sys

import yaml

from lmmhooks.cli.errors import Interrupted, explain
from lmmhooks.errors import MethodError
from lmmhooks_eval.errors import RunError
from tests.cli.invoke import invoke


def test_recipes_are_listed_and_printed() -> None:
    listed = json.loads(invoke("recipes", "--json").out)
    assert {"quickstart", "controls"} <= set(listed)
    assert listed["quickstart"]["model"] == "tiny-llava"
    text = invoke("recipes", "quickstart").out
    assert yaml.safe_load(text)["name"] == "quickstart"
    assert json.loads(invoke("recipes", "quickstart", "--json").out)["batch_size"] == 16
    assert "quickstart" in invoke("recipes").out


def test_an_unknown_recipe_is_bad_input() -> None:
    outcome = invoke("recipes", "quikstart")
    assert outcome.status == 2
    assert "did you mean 'quickstart'" in outcome.err


def test_tasks_are_listed_and_described() -> None:
    listed = json.loads(invoke("tasks", "--json").out)
    assert listed["failed"] == []
    assert listed["tasks"]["scenes-pope"]["primary"] == "accuracy"
    details = json.loads(invoke("tasks", "scenes-pope", "--json").out)
    assert details["parsers"] == ["official", "strict", "opera", "vlmevalkit", "vcd"]
    assert details["documents"] > 1000
    assert "official" in invoke("tasks", "scenes-pope").out


def test_describing_a_task_of_the_hub_reads_no_data() -> None:
    details = json.loads(invoke("tasks", "pope", "--json").out)
    assert details["documents"] is None
    assert details["source"] == {"kind": "hub", "id": "lmms-lab-encoder/POPE", "revision": None}
    assert "known once a run has read them" in invoke("tasks", "pope").out


def test_names_of_recipes_are_shown_whole() -> None:
    from lmmhooks_eval.recipes import shipped

    text = invoke("recipes").out
    assert all(name in text for name in shipped())


def test_an_unknown_task_is_bad_input() -> None:
    outcome = invoke("tasks", "scenes-caption5")
    assert outcome.status == 2
    assert "did you mean 'scenes-caption'" in outcome.err


def test_listing_imports_no_model_library() -> None:
    code = (
        "import sys\nfrom lmmhooks.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    for command in (["recipes"], ["tasks"], ["tasks", "scenes-vqa", "--json"]):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=False)
        assert done.returncode == 0, command


def test_an_unknown_command_suggests_the_nearest() -> None:
    outcome = invoke("tsks")
    assert outcome.status == 2
    assert "did you mean 'tasks'" in outcome.err
    assert outcome.err.count("\n") == 1


def test_errors_become_one_line_and_a_status() -> None:
    assert explain(MethodError("no such\nmethod")) == ("no such method", 2)
    assert explain(RunError("the disk is full")) == ("the disk is full", 1)
    assert explain(FileNotFoundError(2, "No such file or directory", "x.yaml")) == (
        "No such file or directory (x.yaml)",
        2,
    )
    text, status = explain(KeyError("split"))
    assert (text.startswith("KeyError: 'split'"), status) == (True, 1)
    assert explain(Interrupted())[1] == explain(KeyboardInterrupt())[1] == 1


def test_debug_shows_the_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lmmhooks.cli.app", "recipes", "nope", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr
