"""Searching exit layers and fitting recipes on the bundled model, against the same things done by hand."""

from __future__ import annotations

import pathlib

import pytest
import torch

import lmmhooks
from lmmhooks.cost import DecoderShape
from lmmhooks.engines.received import received_by_layer
from lmmhooks.engines.runtime import Runtime, find_runtime
from lmmhooks.errors import LmmhooksError
from lmmhooks.family import resolve
from lmmhooks.methods.reduction.recipes import fit_recipe
from lmmhooks_eval.calibration import calibrate, procedure_for
from lmmhooks_eval.calibration.recipes import REDUCTIONS
from lmmhooks_eval.generate import Generator
from lmmhooks_eval.plan import prepare, select
from lmmhooks_eval.tasks import get_task
from tests.zoo import build

SMALL = {"task": "scenes-vqa", "limit": 5, "batch_size": 3}


@pytest.fixture(scope="module")
def tiny():
    return lmmhooks.load("tiny-llava", dtype="float32")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path / "home")


def alone(model, processor):
    """Inputs of the documents that are measured on, one by one."""
    task = get_task("scenes-vqa")
    for doc in select(task, task.calibration(), 5, 0):
        item = prepare(task, doc, processor)
        yield Generator(model, processor).inputs([item.prompt], [task.images(doc)])


def test_the_exit_is_the_first_layer_that_changes_too_little(tiny, tmp_path):
    model, processor = tiny
    expected = {}
    for layer in (1, 2, 3, 4, 5, 6, 7):
        found = []
        for inputs in alone(model, processor):
            with torch.no_grad():
                full = model(**inputs).logits[0, -1].softmax(dim=-1)
                with lmmhooks.wrap(model, lmmhooks.method("dyvte", layer=layer)):
                    withdrawn = model(**inputs).logits[0, -1].softmax(dim=-1)
            found.append(float((withdrawn * (withdrawn.log() - full.log())).sum()))
        expected[layer] = sum(found) / len(found)
    # Between two layers, so that neither the first nor the last tried is the answer.
    eta = (expected[4] * expected[5]) ** 0.5
    wanted = next(layer for layer, score in expected.items() if score <= eta)
    method = lmmhooks.method("dyvte", layer=None)
    record, path = calibrate(method, model, processor, {**SMALL, "eta": eta, "first": 1}, tmp_path / "layer.json")
    assert record.value == wanted
    scores = dict(record.evidence["scores"])
    assert scores.keys() == expected.keys()
    # Batches pad, which changes the order of summation.
    assert all(scores[layer] == pytest.approx(expected[layer], rel=1e-3, abs=1e-7) for layer in scores)
    with lmmhooks.wrap(model, f"dyvte(layer='{path}')") as patch:
        assert [cut.layer for cut in patch.methods[0].cuts(patch.family)] == [wanted]
    never, _ = calibrate(method, model, processor, {**SMALL, "eta": 0.0, "first": 6})
    assert never.value == 8
    with lmmhooks.wrap(model, method) as patch:
        assert patch.methods[0].layer == 8, "the record of the cache"
        assert patch.methods[0].cuts(patch.family) == []


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_received_attention_is_that_of_full_matrices(name):
    zoo, eager = build(name), build(name, attn="eager")
    inputs = zoo.inputs(batch=2)
    runtime = find_runtime(zoo.model) or Runtime(resolve(zoo.model))
    samples = received_by_layer(runtime, inputs)
    with torch.no_grad():
        attentions = eager.model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"] == zoo.model.config.image_token_id
    for row, (own, cross) in enumerate(samples):
        columns = visual[row].nonzero().flatten()
        behind = [i for i in range(int(columns[0]), visual.shape[1]) if not visual[row, i]]
        for layer, weights in enumerate(attentions):
            strongest = weights[row].amax(dim=0)
            # One layer's sums in another order.
            expected = strongest[columns][:, columns].sum(dim=0) / len(columns)
            torch.testing.assert_close(own[layer], expected, atol=2e-6, rtol=0)
            torch.testing.assert_close(cross[layer], strongest[behind][:, columns].sum(dim=0), atol=2e-5, rtol=0)
    with pytest.raises(lmmhooks.PromptError, match="row 0 has no image"):
        received_by_layer(runtime, zoo.inputs(batch=2, images=[0, 1]))


def test_recipes_are_fitted_to_every_document(tiny, tmp_path):
    model, processor = tiny
    method = lmmhooks.method("fitprune", recipe=None, reduction=0.5)
    record, path = calibrate(method, model, processor, SMALL, tmp_path / "recipe.json")
    runtime = Runtime(resolve(model))
    samples = [received_by_layer(runtime, inputs)[0] for inputs in alone(model, processor)]
    shape = DecoderShape.from_config(model.config.text_config)
    assert "0.9" not in record.value, "the first of eight layers costs more than a tenth"
    for reduction in REDUCTIONS:
        expected = fit_recipe(samples, reduction, shape)
        assert (expected is None) == (f"{reduction:g}" not in record.value)
        if expected is not None:
            assert record.value[f"{reduction:g}"] == pytest.approx(expected, abs=1e-9)
    with lmmhooks.wrap(model, f"fitprune(recipe='{path}', reduction=0.5)") as patch, torch.no_grad():
        model(**next(alone(model, processor)))
        stats = patch.stats
    visual = stats.layers[0].visual_in[0]
    left = [round(visual * (1 - sum(record.value["0.5"][:layer]))) for layer in range(8)]
    assert [layer.visual_kept[0] for layer in stats.layers] == left
    assert left[0] == visual > left[-1]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dyvte", {"eta": -1.0}, "eta"),
        ("dyvte", {"first": -1}, "first"),
        ("dyvte", {"limit": 0}, "limit"),
        ("fitprune", {"eta": 0.1}, "--eta does not apply to fitprune"),
        ("fitprune", {"batch_size": 0}, "batch_size"),
    ],
)
def test_options_that_do_not_apply_are_refused(method, options, message):
    with pytest.raises(LmmhooksError, match=message):
        procedure_for(lmmhooks.method(method), options)


def test_a_first_layer_past_the_last_is_refused(tiny, tmp_path):
    with pytest.raises(LmmhooksError, match="give at most 7"):
        calibrate(lmmhooks.method("dyvte", layer=None), *tiny, {**SMALL, "first": 8}, tmp_path / "x.json")
