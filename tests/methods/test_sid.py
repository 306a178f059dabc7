"""Self-introspective decoding against forwards with full attention matrices, and its selection."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.sid import Sid, hidden_tokens
from tests.methods.shown import FAMILIES, MODES, TOLERANCE, check_logits, check_tokens, inputs_of
from tests.reference.branch_attention import attending, least_attended
from tests.reference.branch_features import NaiveRows, contrast
from tests.zoo import IMAGE, build

ALPHA, BETA, KEEP, LAYER = 1.0, 0.02, 4, 2
METHOD = Sid(alpha=ALPHA, beta=BETA, num_keep=KEEP, layer=LAYER)


def render(zoo, inputs):
    ids = inputs["input_ids"]
    visual = [(row == IMAGE).nonzero().flatten().tolist() for row in ids]
    branch = attending(zoo.model, inputs, least_attended(visual, ids.shape[1], LAYER, KEEP))
    return NaiveRows(zoo.model, inputs, [branch], contrast([1 + ALPHA, -ALPHA], BETA))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_matrices_at_prefill_and_decode(family):
    check_logits(family, METHOD, render)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, METHOD, render, mode)


def test_eager_attention():
    zoo = build("llava", attn="eager")
    inputs = inputs_of(zoo)
    said = []
    for model in (zoo.model, build("llava").model):
        with torch.no_grad(), lmmhooks.wrap(model, METHOD):
            said.append(model(**inputs, logits_to_keep=1).logits)
    torch.testing.assert_close(*said, atol=TOLERANCE, rtol=0)


def test_lazy_branches_change_nothing():
    """Several tokens that were waiting are read in one forward, and rank for themselves."""
    zoo = build("llava")
    inputs = inputs_of(zoo)
    answers = []
    for lazy in (False, True):
        with lmmhooks.wrap(zoo.model, Sid(alpha=2.0, beta=0.9, num_keep=KEEP, lazy=lazy)) as patch:
            answers.append(zoo.model.generate(**inputs, max_new_tokens=8, do_sample=False))
            share = patch.stats.branch_steps
    assert torch.equal(*answers)
    assert share < 1, "a cut that never decides a step proves nothing"


@pytest.mark.parametrize("keep", [{"keep_ratio": 1.0}, {"num_keep": 99}])
def test_with_all_tokens_shown_the_branch_is_the_main_one(keep):
    zoo = build("llava")
    inputs = inputs_of(zoo)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Sid(beta=0.0, **keep)):
            same = zoo.model(**inputs, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(same, plain, atol=TOLERANCE, rtol=0)


def test_a_prompt_without_image_is_cut_and_nothing_else():
    zoo = build("llava")
    inputs = zoo.inputs(images=0)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Sid(beta=0.0, num_keep=2)):
            same = zoo.model(**inputs, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(same, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("below", ["fastervlm(keep=6)", "fastv(keep=6, layer=3)", "var(sink_dims='any')"])
def test_hidden_tokens_are_followed_through_reductions(below):
    """With one token of six shown, what is hidden depends on which six are left, and from which layer on."""
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    said = {}
    with torch.no_grad():
        for keep in (2, 99):
            with lmmhooks.wrap(zoo.model, below, Sid(alpha=1.0, beta=0.0, num_keep=keep)):
                out = zoo.model.generate(
                    **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
                said[keep] = torch.stack(out.logits, dim=1)
                for row in range(2):
                    alone = zoo.model(**zoo.row(inputs, row), logits_to_keep=1).logits
                    torch.testing.assert_close(said[keep][row, :1], alone[0], atol=TOLERANCE, rtol=0)
        with lmmhooks.wrap(zoo.model, below):
            plain = zoo.model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(said[99][:, :1], plain, atol=TOLERANCE, rtol=0)
    assert (said[2][:, :1] - plain).abs().max() > 1e-3


def test_least_attended_tokens_stay():
    attention = torch.tensor([[0.4, 0.1, 0.3, 0.1, 0.1], [0.0, 0.2, 0.2, 0.2, 0.2]])
    visual = torch.tensor([[False, True, True, True, True]] * 2)
    hidden = hidden_tokens(attention, visual, torch.tensor([[2], [3]]))
    assert hidden.tolist() == [[False, False, True, False, True], [False, False, False, False, True]]
    assert not hidden_tokens(attention, visual, torch.tensor([[9], [4]])).any()


@pytest.mark.parametrize("settings", [{"alpha": -1}, {"num_keep": 0}, {"keep_ratio": 1.5}, {"layer": 0}, {"layer": 4}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        lmmhooks.wrap(build("llava").model, Sid(**settings))
