"""AvisC against separate passes with blanked embeddings, and what its statistics must satisfy."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.avisc import Avisc, blind_tokens, staring_layers
from tests.methods.shown import FAMILIES, MODES, TOLERANCE, check_logits, check_tokens, inputs_of
from tests.reference.branch_features import (
    NaiveRows,
    blanked,
    blind,
    changed,
    contrast,
    image_runs,
    of_image,
    prompt_attention,
)
from tests.zoo import IMAGE, build

ALPHA, BETA, LAM = 1.5, 0.02, 0.5
METHOD = Avisc(alpha=ALPHA, beta=BETA, lam=LAM)


def render(eager, inputs):
    attention = prompt_attention(eager.model, inputs)
    changes = []
    for row in range(2):
        runs = image_runs(inputs["input_ids"][row], inputs["attention_mask"][row], IMAGE)
        keep = set()
        for run in runs:
            keep |= {run[j] for j in blind(of_image(attention, inputs["attention_mask"], row, run), 0.5, LAM)}
        changes.append(blanked(keep, runs))
    return NaiveRows(eager.model, inputs, [changed(eager.model, inputs, changes)], contrast([1 + ALPHA, -ALPHA], BETA))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_passes_at_prefill_and_decode(family):
    check_logits(family, METHOD, render)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, METHOD, render, mode)


def test_layers_with_the_largest_shares_hold_gamma_of_the_attention():
    attention = torch.tensor([0.1, 0.4, 0.2, 0.3])[:, None].expand(-1, 5)
    assert staring_layers(attention, 0.0).tolist() == [False, True, False, False]
    assert staring_layers(attention, 0.39).tolist() == [False, True, False, False]
    assert staring_layers(attention, 0.5).tolist() == [False, True, False, True]
    assert staring_layers(attention, 0.95).tolist() == [True, True, True, True]
    equal = torch.ones(4, 5)
    assert staring_layers(equal, 0.5).tolist() == [True, True, False, False], "ties go to the earlier layer"


def test_far_thresholds_show_everything_or_nothing():
    attention = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    assert blind_tokens(attention, 0.5, -100.0).all()
    assert not blind_tokens(attention, 0.5, 100.0).any()
    assert blind_tokens(attention[:, :1], 0.5, 1.0).tolist() == [True]


def test_with_all_tokens_blind_the_branch_is_the_main_one():
    zoo = build("llava")
    inputs = inputs_of(zoo)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Avisc(lam=-100.0, beta=0.0)):
            same = zoo.model(**inputs).logits[:, -1]
    torch.testing.assert_close(same, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("fill", ["ones", "noise"])
def test_fills_differ(fill):
    zoo = build("llava")
    inputs = inputs_of(zoo)
    said = []
    with torch.no_grad():
        for method in (METHOD, Avisc(alpha=ALPHA, beta=BETA, lam=LAM, fill=fill)):
            with lmmhooks.wrap(zoo.model, method):
                said.append(zoo.model(**inputs).logits[:, -1])
                assert torch.equal(zoo.model(**inputs).logits[:, -1], said[-1])
    kept = said[0].isfinite()
    assert (said[0] - said[1])[kept].abs().max() > 1e-2


def test_lazy_branches_change_nothing():
    zoo = build("qwen2_5_vl")
    inputs = inputs_of(zoo)
    answers = []
    for lazy in (False, True):
        with lmmhooks.wrap(zoo.model, Avisc(alpha=2.0, beta=0.9, lam=LAM, lazy=lazy)) as patch:
            answers.append(zoo.model.generate(**inputs, max_new_tokens=8, do_sample=False))
            share = patch.stats.branch_steps
    assert torch.equal(*answers)
    assert share < 1, "a cut that never decides a step proves nothing"


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"layer_gamma": 1.5}, {"fill": "twos"}, {"seed": -1}, {"beta": 2.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        Avisc(**settings)
