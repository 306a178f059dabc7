"""`lmmhooks bench` as users run it."""

from __future__ import annotations

import json

import pytest

from tests.cli.invoke import invoke
from tests.test_loading import save
from tests.zoo import build

QUICK = ("bench", "--config", "test-shape", "--repeat", "2", "--decode-tokens", "2", "--device", "cpu")


def test_result_file_and_json_say_the_same(tmp_path) -> None:
    file = tmp_path / "new" / "bench.json"
    done = invoke(*QUICK, "--method", "var(sink_dims='any')", "--layers", "4", "--json", "--out", str(file))
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert record == json.loads(file.read_text())
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]
    assert (record["kind"], record["decoder_layers"], record["visual_tokens"], record["text_tokens"]) == (
        "bench",
        4,
        64,
        64,
    )
    assert record["attention"] == "sdpa"
    assert {"commit", "dirty", "device_name", "versions", "command", "threads"} <= set(record["environment"])
    assert set(record["disabled"]) == {"vision", "decoder", "prefill", "decode"}
    (variant,) = record["variants"]
    assert variant["methods"] == ["var(sink_dims='any')"]
    assert variant["ratios"]["prefill"]["median"] > 0


def test_loaded_model(tmp_path) -> None:
    folder = save("qwen2_5_vl", build("qwen2_5_vl").model, tmp_path)
    options = (
        "--visual-tokens",
        "16",
        "--text-tokens",
        "12",
        "--repeat",
        "2",
        "--decode-tokens",
        "1",
        "--device",
        "cpu",
    )
    done = invoke("bench", "--model", str(folder), *options, "--method", "random(keep=4)", "--json")
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert record["visual_tokens"] == 16
    assert set(record["variants"][0]["visual_kept"]) == {4}
    assert record["variants"][0]["over_limit"]["median"] > 0


def test_table_for_people() -> None:
    done = invoke(*QUICK, "--no-disabled", "--method", "fastv(keep=16) + var(sink_dims='any')")
    assert done.status == 0, done.err
    assert "plain model: vision" in done.out
    assert "fastv(keep=16) + " in done.out
    assert "wrapped, disabled" not in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench",), "either --model"),
        (("bench", "--config", "test-shape", "--model", "tiny-llava"), "not both"),
        (("bench", "--config", "test-shap"), "did you mean 'test-shape'"),
        (("bench", "--config", "test-shape", "--dtype", "float23"), "did you mean 'float32'"),
        (("bench", "--config", "test-shape", "--device", "abacus"), "device 'abacus' cannot be used"),
        (("bench", "--config", "test-shape", "--method", "var + "), "has an empty part"),
        (("bench", "--config", "test-shape", "--visual-tokens", "10"), "makes 64 visual tokens"),
        (("bench", "--config", "test-shape", "--method", "varr"), "did you mean 'var'"),
        (("bench", "--model", "tiny-llava", "--layers", "2"), "scale a named shape"),
    ],
)
def test_bad_input_is_one_line(arguments, message) -> None:
    done = invoke(*arguments)
    assert done.status == 2
    assert message in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")


def test_unwritable_out_is_refused_before_measuring(tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for out, reason in ((blocked / "bench.json", "File exists"), (tmp_path, "Is a directory")):
        done = invoke(*QUICK, "--out", str(out))
        assert done.status == 2
        assert done.err == f"error: cannot write {out} ({reason}): choose another --out\n"
