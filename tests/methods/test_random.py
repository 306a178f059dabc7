"""Random selection: the draw, and that it belongs to the prompt alone."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import find_runtime
from lmmhooks.methods.reduction.random import random_indices
from tests.zoo import FAMILIES, build


def kept(zoo, inputs, spec):
    """Per row and image, the cells that stay."""
    with torch.no_grad(), lmmhooks.wrap(zoo.model, spec):
        zoo.model(**inputs)
        spans = find_runtime(zoo.model).last.stages[0].layout.spans
    return [(s.sample, s.image, s.tokens.crop.tolist(), s.tokens.row.tolist(), s.tokens.col.tolist()) for s in spans]


def test_subsets_are_exact_and_without_repetition():
    index = random_indices(50, 20, list(range(40)), seed=0)
    assert index.shape == (40, 20)
    assert all(len(row.unique()) == 20 for row in index)
    assert index.min() >= 0
    assert index.max() < 50


def test_every_token_is_drawn_about_equally_often():
    """4000 draws of 10 in 40: 1000 expected, standard deviation 27; six of those bound the largest of 40 deviations."""
    counts = torch.bincount(random_indices(40, 10, list(range(4000)), seed=0).flatten(), minlength=40)
    assert (counts - 1000).abs().max() < 6 * 27


def test_seed_and_stream_decide_and_nothing_else():
    one = random_indices(64, 8, [7, 9], seed=3)
    assert torch.equal(one, random_indices(64, 8, [7, 9], seed=3))
    assert torch.equal(one[1:], random_indices(64, 8, [9], seed=3))
    assert not torch.equal(one, random_indices(64, 8, [7, 9], seed=4))
    assert not torch.equal(one[0], one[1])
    # Frozen: another value would silently change every stored run of this control.
    assert random_indices(100, 6, [12345], seed=0).tolist() == [[86, 85, 43, 44, 33, 17]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_keeps_its_tokens_in_every_batch(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=3, images=[2, 1, 1])
    together = kept(zoo, inputs, "random(keep=0.5)")
    for row in range(3):
        alone = kept(zoo, zoo.row(inputs, row), "random(keep=0.5)")
        assert [entry[1:] for entry in alone] == [entry[1:] for entry in together if entry[0] == row]
    assert kept(zoo, inputs, "random(keep=0.5, seed=1)") != together


def test_global_randomness_is_neither_used_nor_disturbed():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = kept(zoo, inputs, "random(keep=5)")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert kept(zoo, inputs, "random(keep=5)") == first


def test_order_drawn_reaches_the_decoder_unsorted():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        logits = []
        for spec in ("random(keep=6)", "random(keep=6, sorted=False)"):
            with lmmhooks.wrap(zoo.model, spec):
                logits.append(zoo.model(**inputs).logits[:, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    same = [kept(zoo, inputs, spec) for spec in ("random(keep=6)", "random(keep=6, sorted=False)")]
    assert sorted(zip(*same[0][0][2:], strict=True)) == sorted(zip(*same[1][0][2:], strict=True))


def test_crops_may_be_pooled():
    zoo = build("internvl")  # three tiles of four tokens
    inputs = zoo.inputs(batch=1)
    ((_, _, crops, _, _),) = kept(zoo, inputs, "random(keep=6)")
    assert [crops.count(crop) for crop in range(3)] == [2, 2, 2]
    draws = {tuple(kept(zoo, inputs, f"random(keep=6, per_crop=False, seed={seed})")[0][2]) for seed in range(8)}
    assert all(len(draw) == 6 for draw in draws)
    assert any([draw.count(crop) for crop in range(3)] != [2, 2, 2] for draw in draws)


@pytest.mark.parametrize("settings", [{"keep": 1.5}, {"keep": -1}, {"keep": True}, {"keep": 3, "newline": "rank"}])
def test_values_out_of_range_are_refused_by_name(settings):
    with pytest.raises(lmmhooks.MethodError, match=list(settings)[-1]):
        lmmhooks.method("random", **settings)


def test_keep_must_be_given():
    with pytest.raises(lmmhooks.MethodError, match="keep"):
        lmmhooks.wrap(build("llava").model, "random")
