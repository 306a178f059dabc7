"""Records of measured settings: written, found, and refused where they do not belong."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

import lmmhooks
from lmmhooks.engines.records import Record, read_record, record_file, write_record
from lmmhooks.loading import identity
from lmmhooks.methods.attention.act import Act
from lmmhooks.methods.tensors import TensorSet
from tests.zoo import build

HEADS = {"2": [1, 3]}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def model():
    return build("llava").model


def heads(model, **changes):
    return Record(**{"method": "act", "field": "heads", "checkpoint": identity(model), "value": HEADS} | changes)


def directions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"textual": (4, 64), "visual": (3, 1, 32)}
    return TensorSet({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def test_what_is_written_is_read(tmp_path, model):
    for record in (heads(model), Record("vti", "directions", identity(model), directions(), {"summary": "x"})):
        write_record(record, tmp_path / "deep" / "r.json")
        assert read_record(tmp_path / "deep" / "r.json") == record
    assert sorted(file.suffix for file in (tmp_path / "deep").iterdir()) == [".json", ".safetensors"]


def test_wrap_finds_the_record_of_a_checkpoint(model):
    write_record(heads(model), record_file("act", "heads", identity(model)))
    with lmmhooks.wrap(model, "act") as patch:
        assert patch.methods == (Act(heads=HEADS),)
    with pytest.raises(lmmhooks.MethodError, match="heads has to be measured"):
        lmmhooks.wrap(build("llava", seed=1).model, "act")


def test_a_record_can_be_named(tmp_path, model):
    file = tmp_path / "heads.json"
    write_record(heads(model), file)
    with lmmhooks.wrap(model, f"act(heads='{file}')") as patch:
        assert patch.methods == (Act(heads=HEADS),)
    write_record(Record("vti", "directions", identity(model), directions()), tmp_path / "d.json")
    with lmmhooks.wrap(model, lmmhooks.method("vti", directions=str(tmp_path / "d.json"))) as patch:
        assert patch.methods[0].directions == directions()


def test_a_folder_of_weights_may_carry_its_own_records(tmp_path, model):
    folder = tmp_path / "weights"
    write_record(heads(model), record_file("act", "heads", identity(model), folder / "lmmhooks"))
    with pytest.raises(lmmhooks.MethodError, match="has to be measured"):
        lmmhooks.wrap(model, "act")
    model.config._name_or_path = str(folder)
    with lmmhooks.wrap(model, "act") as patch:
        assert patch.methods == (Act(heads=HEADS),)


def test_the_name_of_a_checkpoint_does_not_matter(tmp_path, model):
    file = tmp_path / "heads.json"
    write_record(heads(model, checkpoint=identity(model) | {"name": "elsewhere/copy", "revision": "abc"}), file)
    lmmhooks.wrap(model, f"act(heads='{file}')").remove()


def test_a_record_of_another_checkpoint_is_refused_with_both_named(tmp_path, model):
    file, other = tmp_path / "heads.json", build("llava", seed=1).model
    write_record(heads(other, checkpoint=identity(other) | {"name": "org/other"}), file)
    model.config._name_or_path = "org/this"
    with pytest.raises(lmmhooks.MethodError) as error:
        lmmhooks.wrap(model, f"act(heads='{file}')")
    text = str(error.value)
    assert f"measured on org/other (weights {identity(other)['fingerprint'][:12]})" in text
    assert f"this model is org/this (weights {identity(model)['fingerprint'][:12]})" in text
    assert f"`lmmhooks calibrate act --model org/this --dtype float32 --out {file}`" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "other"}, "holds heads of other, not heads of act"),
        ({"field": "thr"}, "holds thr of act, not heads of act"),
        ({"value": {"2": [99]}}, "a list for this model"),
        (
            {"value": {}, "evidence": {"summary": "0 of 8 heads"}},
            r"could not be found .*0 of 8 heads.*set heads yourself",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path, model, changes, message):
    write_record(heads(model, **changes), tmp_path / "r.json")
    with pytest.raises(lmmhooks.MethodError, match=message):
        lmmhooks.wrap(model, f"act(heads='{tmp_path / 'r.json'}')")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        ("{", "is not JSON"),
        ("[]", "is no record"),
        ('{"record": 2}', "is no record"),
        ('{"record": 1, "method": "act"}', "has no 'field'"),
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, model, text, message):
    file = tmp_path / "r.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(lmmhooks.MethodError, match=rf"r\.json.*{message}.*lmmhooks calibrate"):
        lmmhooks.wrap(model, f"act(heads='{file}')")


def test_tensors_that_are_missing_or_of_another_record_are_refused(tmp_path, model):
    file = tmp_path / "d.json"
    write_record(Record("vti", "directions", identity(model), directions()), file)
    (tensors,) = tmp_path.glob("*.safetensors")
    write_record(Record("vti", "directions", identity(model), directions(seed=1)), tmp_path / "other" / "d.json")
    (others,) = (tmp_path / "other").glob("*.safetensors")
    tensors.write_bytes(others.read_bytes())
    for damage in (lambda: None, lambda: tensors.write_bytes(b"x"), tensors.unlink):
        damage()
        with pytest.raises(lmmhooks.MethodError, match=f"needs {tensors.name} beside it"):
            lmmhooks.wrap(model, f"vti(directions='{file}')")


def test_a_damaged_record_in_the_cache_counts_as_none(model):
    file = record_file("act", "heads", identity(model))
    file.parent.mkdir(parents=True)
    file.write_text('{"record": 1')
    with pytest.raises(lmmhooks.MethodError, match="heads has to be measured"):
        lmmhooks.wrap(model, "act")


def test_replacing_a_record_leaves_no_half_of_it(tmp_path, model):
    file = tmp_path / "d.json"
    for seed in (0, 1):
        write_record(Record("vti", "directions", identity(model), directions(seed)), file)
    assert read_record(file).value == directions(seed=1)
    assert len(list(tmp_path.iterdir())) == 2, "temporary files and replaced tensors are gone"
    assert json.loads(file.read_text())["value"]["shapes"] == {"textual": [4, 64], "visual": [3, 1, 32]}
