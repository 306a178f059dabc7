"""Measuring layer contributions and visual heads on the bundled model, against the same things done by hand."""

from __future__ import annotations

import pathlib

import pytest
import torch

import lmmhooks
from lmmhooks.errors import LmmhooksError
from lmmhooks_eval.calibration import calibrate, procedure_for
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import prepare, select
from lmmhooks_eval.tasks import get_task

SMALL = {"task": "scenes-vqa", "limit": 5, "batch_size": 3}


@pytest.fixture(scope="module")
def tiny():
    return lmmhooks.load("tiny-llava", dtype="float32")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")


def alone(processor, model):
    """Inputs of the documents that are measured on, one by one."""
    task = get_task("scenes-vqa")
    for doc in select(task, task.calibration(), 5, 0):
        item = prepare(task, doc, processor)
        yield Generator(model, processor).inputs([item.prompt], [task.images(doc)])


def test_layers_are_ordered_by_what_freezing_them_changes(tiny, tmp_path):
    model, processor = tiny
    record, path = calibrate(lmmhooks.method("shortv"), model, processor, SMALL, tmp_path / "layers.json")
    scores = record.evidence["scores"]
    assert len(scores) == 8
    assert record.value == sorted(range(8), key=lambda layer: scores[layer])
    assert max(scores) > 10 * min(scores), "layers that all count the same would prove nothing"
    for layer in (record.value[0], record.value[-1]):
        divergences = []
        for inputs in alone(processor, model):
            with torch.no_grad():
                full = model(**inputs).logits[:, -1]
                with lmmhooks.wrap(model, lmmhooks.method("shortv", layers=(layer,))):
                    frozen = model(**inputs).logits[:, -1]
            divergences.append(
                torch.nn.functional.kl_div(full.log_softmax(-1), frozen.softmax(-1), reduction="batchmean")
            )
        assert scores[layer] == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-3, abs=1e-7)
    with lmmhooks.wrap(model, f"shortv(layers='{path}')") as patch:
        (method,) = patch.methods
        assert list(method.frozen_layers(patch.family)) == record.value[:5], "0.6 of 8 layers"
    with lmmhooks.wrap(model, f"shortv(layers='{path}', num_layers=2)") as patch:
        assert list(patch.methods[0].frozen_layers(patch.family)) == record.value[:2]


def test_the_measured_order_is_found_when_the_model_is_wrapped(tiny):
    model, processor = tiny
    record, _ = calibrate(lmmhooks.method("shortv"), model, processor, {**SMALL, "limit": 2})
    with lmmhooks.wrap(model, "shortv") as patch:
        assert list(patch.methods[0].layers) == record.value


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen"])
def test_bundled_models_carry_their_order(name):
    model, processor = lmmhooks.load(name, dtype="float32")
    with lmmhooks.wrap(model, "shortv", processor=processor) as patch:
        frozen = patch.methods[0].frozen_layers(patch.family)
        assert len(frozen) == 5
        assert frozen[0] == 7, "no row that is read sees what the last layer makes of visual tokens"
        image = get_task("scenes-pope").images(get_task("scenes-pope").load()[0])[0]
        assert patch.answer(image, "Is there a tree in the image?", max_new_tokens=2, do_sample=False) in ("Yes", "No")
        assert patch.stats.flops_saved > 0.2


@pytest.mark.parametrize("rule", ["mean", "vote"])
def test_heads_are_kept_that_look_at_the_image(tiny, tmp_path, rule):
    model, processor = tiny
    eager, _ = lmmhooks.load("tiny-llava", dtype="float32", attn_implementation="eager")
    every = []
    for inputs in alone(processor, eager):
        out = eager.generate(
            **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        visual = torch.zeros(out.attentions[1][0].shape[-1], dtype=torch.bool)
        visual[: inputs["input_ids"].shape[1]] = inputs["input_ids"][0] == eager.config.image_token_id
        rows = torch.stack([layer[0, :, 0] for layer in out.attentions[1]])
        every.append(rows[..., visual].sum(-1) / rows[..., ~visual].sum(-1))
    ratios = torch.stack(every)
    threshold = float(ratios.mean(dim=0)[2:].median())
    options = {**SMALL, "threshold": threshold * 1.001, "rule": rule}
    record, path = calibrate(lmmhooks.method("yopo"), model, processor, options, tmp_path / "heads.json")
    torch.testing.assert_close(torch.tensor(record.evidence["ratios"]), ratios.mean(dim=0), atol=2e-5, rtol=1e-3)
    above = ratios > options["threshold"]
    expected = ratios.mean(dim=0) > options["threshold"] if rule == "mean" else above.float().mean(dim=0) > 0.5
    expected[:2] = True
    assert record.value == {str(layer): row.nonzero().flatten().tolist() for layer, row in enumerate(expected)}
    assert 0 < int(expected[2:].sum()) < expected[2:].numel()
    with lmmhooks.wrap(model, f"yopo(heads='{path}')") as patch:
        (method,) = patch.methods
        assert dict(method.heads)[2] == tuple(record.value["2"])
        assert patch.attached


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "shortv",
            {"margin": 0.1},
            "--margin does not apply to shortv, whose layers are measured with --task",
        ),
        ("shortv", {"threshold": 0.1}, "--threshold does not apply to shortv"),
        (
            "yopo",
            {"margin": 0.1},
            "--margin does not apply to yopo, whose heads are measured with --task",
        ),
        ("act", {"rule": "vote"}, "--rule does not apply to act"),
        ("yopo", {"threshold": 0.0}, "threshold"),
        ("yopo", {"rule": "median"}, "rule"),
        ("shortv", {"limit": 0}, "limit"),
        ("shortv", {"task": "scenes-vqe"}, "did you mean 'scenes-vqa'"),
    ],
)
def test_options_that_do_not_apply_are_refused(method, options, message):
    with pytest.raises(LmmhooksError, match=message):
        procedure_for(lmmhooks.method(method), options)
