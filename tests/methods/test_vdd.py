"""Visual debias decoding against separate passes without image and with one token in its place."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.vdd import Vdd
from tests.methods.shown import FAMILIES, MODES, check_logits, check_tokens, inputs_of
from tests.reference.branch_features import NaiveRows, changed, contrast, image_runs, replaced
from tests.zoo import IMAGE, build

ALPHA, BETA, TOKEN = 1.0, 0.02, 77


def rendering(use):
    def render(eager, inputs):
        family = resolve(eager.model)
        unk = family.text_model.embed_tokens.weight[TOKEN]
        branches = []
        for name in ("none", "unk") if use == "both" else (use,):
            changes = []
            for row in range(2):
                ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row]
                runs = image_runs(ids, mask, IMAGE)
                shown = {run[0]: [unk] for run in runs} if name == "unk" else {}
                gone = [i for i, token in enumerate(ids[mask.bool()].tolist()) if token in family.visual_ids]
                changes.append(replaced(shown, set(gone)))
            branches.append(changed(eager.model, inputs, changes))
        weights = [1 + ALPHA, *[-ALPHA / len(branches)] * len(branches)]
        return NaiveRows(eager.model, inputs, branches, contrast(weights, BETA))

    return render


def method(use, **settings):
    return Vdd(alpha=ALPHA, beta=BETA, use=use, token=TOKEN, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_passes_at_prefill_and_decode(family):
    check_logits(family, method("both"), rendering("both"))


@pytest.mark.parametrize("use", ["none", "unk"])
def test_one_prior_alone(use):
    check_logits("qwen2_5_vl", method(use), rendering(use))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, method("both"), rendering("both"), mode)


def test_lazy_branches_change_nothing():
    zoo = build("qwen3_vl")
    inputs = inputs_of(zoo)
    answers = []
    for lazy in (False, True):
        with lmmhooks.wrap(zoo.model, Vdd(alpha=1.0, beta=0.9, lazy=lazy)) as patch:
            answers.append(zoo.model.generate(**inputs, max_new_tokens=8, do_sample=False))
            share = patch.stats.branch_steps
    assert torch.equal(*answers)
    assert share < 1, "a cut that never decides a step proves nothing"


def test_both_is_the_mean_of_the_logits():
    zoo = build("llava")
    inputs = inputs_of(zoo)
    said = {}
    with torch.no_grad():
        for use in ("none", "unk", "both"):
            with lmmhooks.wrap(zoo.model, Vdd(alpha=1.0, beta=0.0, use=use, token=TOKEN)):
                said[use] = zoo.model(**inputs, logits_to_keep=1).logits
    # Sums in another order, of logits of about 6.
    torch.testing.assert_close(said["both"], (said["none"] + said["unk"]) / 2, atol=2e-5, rtol=0)


def test_the_token_is_that_of_the_release_or_of_the_configuration():
    with lmmhooks.wrap(build("llava").model, "vdd") as patch:
        assert patch.methods[0].token == 0
    zoo = build("qwen2_5_vl")
    with lmmhooks.wrap(zoo.model, "vdd") as patch:
        assert patch.methods[0].token == zoo.model.config.text_config.pad_token_id


def test_bad_settings_and_prompts_are_refused():
    zoo = build("llava")
    for settings in ({"alpha": -1}, {"use": "noise"}, {"token": -1}):
        with pytest.raises(MethodError, match=next(iter(settings))):
            Vdd(**settings)
    with pytest.raises(MethodError, match="stands for an image"):
        lmmhooks.wrap(zoo.model, Vdd(token=IMAGE))
    with lmmhooks.wrap(zoo.model, Vdd()), pytest.raises(PromptError, match="row 0 of 1 has none"):
        zoo.model.generate(**zoo.inputs(images=0), max_new_tokens=1)
