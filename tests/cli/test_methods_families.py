"""`lmmhooks methods` and `lmmhooks families` as users run them."""

from __future__ import annotations

import json

import pytest

from tests.cli.invoke import invoke


@pytest.fixture(scope="module")
def listed() -> dict:
    return json.loads(invoke("methods", "--json").out)


def test_every_method_says_what_it_is(listed) -> None:
    assert listed["failed"] == {}
    assert {"var", "vcd", "fastervlm", "fastv", "random", "uniform-grid"} <= set(listed["methods"])
    for name, about in listed["methods"].items():
        assert about["kind"] in ("attention", "reduction", "decoding", "refinement"), name
        assert about["paper"], name
        # A summary is the first sentence of the module, not a fragment of it.
        assert 20 < len(about["summary"]) < 250, name
        for setting, details in about["settings"].items():
            assert details["help"], f"{name}.{setting}"


def test_one_method() -> None:
    text = invoke("methods", "var").out
    assert "2503.03321" in text
    assert "rho" in text
    details = json.loads(invoke("methods", "var", "--json").out)
    assert details["settings"]["p"]["default"] == 0.6
    assert details["source"] == "lmmhooks/methods/attention/var.py"
    assert [claim.partition(":")[0] for claim in details["unverified"]] == ["tau", "sink_dims"]


def test_kinds_filter() -> None:
    kinds = {
        each["kind"] for each in json.loads(invoke("methods", "--kind", "decoding", "--json").out)["methods"].values()
    }
    assert kinds == {"decoding"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("methods", "varr"), "did you mean 'var'"),
        (("methods", "--kind", "reducton"), "did you mean 'reduction'"),
        (("families", "qwen2_vll"), "did you mean 'qwen2_vl'"),
    ],
)
def test_mistyped_names_are_one_line(arguments, message) -> None:
    done = invoke(*arguments)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_families() -> None:
    found = json.loads(invoke("families", "--json").out)
    assert {"llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"} <= set(found)
    one = json.loads(invoke("families", "qwen3_vl", "--json").out)
    assert "deepstack" in one["about"]
    assert "qwen3_vl" in invoke("families").out
