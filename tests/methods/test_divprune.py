"""DivPrune against loops over distances."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from tests.engines.reducers import visual_groups
from tests.methods.choosing import FAMILIES, compare, plain, prompt_state
from tests.reference import diversity
from tests.zoo import build


@pytest.mark.parametrize("order", ["raster", "selection"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family, order):
    def naive(group):
        if len(group.numbers) <= 5:
            return plain(range(len(group.numbers)))
        return plain(diversity.divprune(group.states, 5), ascending=order == "raster")

    method = lmmhooks.method("divprune", keep=5, order=order)
    # Newline tokens compete with the others.
    compare(family, method, naive, by_crop=False, with_newlines=True, images=(1, 1))


def test_newline_tokens_may_be_left_out():
    def naive(group):
        return plain(diversity.divprune(group.states, 6))

    compare("llava_next", lmmhooks.method("divprune", keep=6, newline="drop"), naive, by_crop=False)


def test_shares_round_to_the_nearest_token():
    method = lmmhooks.method("divprune")
    assert method.keep == 0.098
    assert [method.count(0.098, n) for n in (576, 2880, 5, 1)] == [56, 282, 1, 1]


def test_it_composes_and_forgets():
    zoo = build("llava")
    inputs, other = zoo.inputs(batch=2), zoo.inputs(batch=2, seed=1)
    alone = prompt_state(zoo, inputs, "divprune(keep=6)").stages[0].index
    with torch.no_grad(), lmmhooks.wrap(zoo.model, "divprune(keep=6)", "var(sink_dims='any')", "vcd(beta=0.0)"):
        zoo.model(**other)
        zoo.model.generate(**inputs, max_new_tokens=2)
        stacked = find_runtime(zoo.model).last.stages[0].index
    assert torch.equal(stacked[:2, -alone.shape[1] :], alone)
    assert len(visual_groups(zoo.model, inputs, 0)[0]) == 16


def test_keeping_everything_is_bit_identical():
    zoo = build("qwen3_vl")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain_logits = zoo.model(**inputs).logits
        for keep in (1.0, 10_000):
            with lmmhooks.wrap(zoo.model, lmmhooks.method("divprune", keep=keep)):
                assert torch.equal(zoo.model(**inputs).logits, plain_logits)


@pytest.mark.parametrize("settings", [{"keep": 1.5}, {"order": "random"}, {"newline": "no"}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=next(iter(settings))):
        lmmhooks.method("divprune", **settings)
