"""What holds for all methods by diversity, coverage and pooling: beside others, with a budget, with nothing to do."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from tests.methods.choosing import prompt_state
from tests.zoo import build

NAMES = ("divprune", "cdpruner", "holov", "scope", "mmtok", "vmtc", "pool")
every_method = pytest.mark.parametrize("name", NAMES)


def make(name, **settings):
    return lmmhooks.method(name, **settings, **({"words": "tokens"} if name == "mmtok" else {}))


@every_method
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_edits_and_branches_beside_it_see_the_same_tokens(name, family):
    zoo = build(family)
    inputs, earlier = zoo.inputs(batch=2), zoo.inputs(batch=2, seed=1)
    method = make(name, keep=6)
    alone = prompt_state(zoo, inputs, method)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, method, "var(sink_dims='any')", "vcd(beta=0.0)"):
        zoo.model.generate(**earlier, max_new_tokens=2)
        zoo.model.generate(**inputs, max_new_tokens=2)
        beside = find_runtime(zoo.model).last
    for row in range(2):
        (before,), (after,) = alone.stages[0].layout.spans_of(row), beside.stages[0].layout.spans_of(row)
        assert torch.equal(before.tokens.row, after.tokens.row)
        assert torch.equal(before.tokens.col, after.tokens.col)


@every_method
@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_keeping_everything_is_bit_identical(name, family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        for keep in (1.0, 10_000):
            with lmmhooks.wrap(zoo.model, make(name, keep=keep)):
                assert torch.equal(zoo.model(**inputs).logits, plain)


@every_method
def test_rows_without_an_image_are_left_alone(name):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[1, 0], text=[5, 12])
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, make(name, keep=4)) as patch:
            reduced = zoo.model(**inputs).logits
            assert patch.stats.layers[0].visual_kept == (4, 0)
    # The row is padded to another length, which changes the order of summation; largest difference seen is 2e-6.
    valid = inputs["attention_mask"][1].bool()
    torch.testing.assert_close(reduced[1, valid], plain[1, valid], atol=2e-5, rtol=0)


@every_method
@pytest.mark.parametrize("settings", [{"budget": 0.5}, {"budget": 8}, {"budget": 8, "keep_per": "prompt"}])
def test_budgets_are_met(name, settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[1, 1])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, make(name, **settings)) as patch:
        zoo.model(**inputs)
        assert patch.stats.average_visual == 8


@every_method
def test_half_precision_runs(name):
    zoo = build("llava", dtype=torch.bfloat16)
    inputs = zoo.inputs(batch=1)
    with torch.no_grad(), lmmhooks.wrap(zoo.model, make(name, keep=4)) as patch:
        logits = zoo.model(**inputs).logits
        assert patch.stats.layers[0].visual_kept == (4,)
    assert logits.dtype is torch.bfloat16
    assert torch.isfinite(logits).all()


@every_method
def test_gradients_reach_through(name):
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    embed = zoo.model.get_input_embeddings().weight
    with lmmhooks.wrap(zoo.model, make(name, keep=4)):
        (gradient,) = torch.autograd.grad(zoo.model(**inputs).logits.sum(), embed)
    assert gradient.abs().sum() > 0
