"""`lmmhooks calibrate` as users run it, on the bundled model."""

from __future__ import annotations

import json
import pathlib

import pytest

import lmmhooks
from tests.cli.invoke import invoke


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def test_wrap_names_the_command_and_finds_what_it_measured():
    model, processor = lmmhooks.load("tiny-llava", dtype="float32")
    model.config._name_or_path = "tiny-llava"  # not its folder, which carries records of its own
    with pytest.raises(lmmhooks.MethodError) as error:
        lmmhooks.wrap(model, "vti")
    command = str(error.value).split("`")[1]
    assert command == "lmmhooks calibrate vti --model tiny-llava --dtype float32"
    done = invoke(*command.split()[1:], "--limit", "2", "--trials", "1", "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert record["value"]["shapes"] == {"textual": [8, 192], "visual": [5, 65, 128]}
    assert record["evidence"]["options"]["mask_ratio"] == 0.99
    assert f"written to {record['file']}" in done.err
    with lmmhooks.wrap(model, "vti", processor=processor) as patch:
        assert patch.methods[0].directions.digest == record["value"]["digest"]


def test_head_list_in_a_file_of_choice(tmp_path):
    out = tmp_path / "lists" / "heads.json"
    method = "act(skip_layers=(0, 1, 2, 4, 5, 6, 7))"
    done = invoke("calibrate", method, "--model", "tiny-llava", "--limit", "6", "--out", str(out))
    assert done.status == 0, done.err
    assert "of 6 heads, edited alone, answer more than" in done.out
    record = json.loads(out.read_text())
    assert [row[:2] for row in record["evidence"]["scores"]] == [[3, head] for head in range(6)]
    assert record["checkpoint"]["name"] == "tiny-llava"
    if not record["value"]:
        assert "nothing was found, so wrap will refuse act without heads" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("acct",), "unknown method 'acct'; did you mean 'act'?"),
        (("vcd",), "vcd has no setting"),
        (("vti", "--margin", "0.1"), "--margin does not apply to vti"),
        (("act", "--task", "scenes-pop"), "did you mean 'scenes-pope'"),
        (("act", "--out", "heads.txt"), "does not end in .json"),
        (("vti", "--demos", "nowhere.jsonl"), "demonstrations nowhere.jsonl do not exist"),
        (("act", "--model", "no-such-model"), "no model 'no-such-model'"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    model = () if "--model" in arguments else ("--model", "tiny-llava")
    done = invoke("calibrate", *arguments, *model)
    assert done.status == 2
    assert message in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("act", "measured on the checkpoint: heads, with `lmmhooks calibrate act`"),
        ("var", "measured on the checkpoint: sink_dims, when a model is wrapped"),
    ],
)
def test_the_listing_says_what_is_measured_and_when(method, line):
    assert line in invoke("methods", method).out
