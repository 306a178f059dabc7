"""ONLY against its naive rendering, and the invariants of what it makes of one attention row."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError, ModelError
from lmmhooks.methods.decoding.base import plausible
from lmmhooks.methods.decoding.only import Only, entropy_of, head_outputs, text_leaning, without_outliers
from tests.methods.layerwise import (
    MODES,
    check_composes,
    check_half_precision,
    check_logits,
    check_one_pass,
    check_other_loops,
    check_tokens,
    wrapped,
)
from tests.reference.layers import NaiveReading, only
from tests.zoo import build

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
#: The predictions of random models are far apart: 0 contrasts all steps, 2 adds all, a value between them does both.
GAMMA, BETA = 1.0, 0.02


def pair(layer=0, gamma=GAMMA, beta=BETA, a_pos=2.0, a_neg=1.0):
    method = Only(a_pos=a_pos, a_neg=a_neg, gamma=gamma, layer=layer, beta=beta)
    return method, only(a_pos, a_neg, gamma, beta, layer)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_naive_rendering(family, layer):
    check_logits(family, *pair(layer), layer)


@pytest.mark.parametrize("gamma", [0.0, 2.1])
def test_contrasted_and_added_everywhere(gamma):
    check_logits("llava", *pair(gamma=gamma, beta=0.0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, mode, *pair())


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_composes(family):
    check_composes(family, pair(layer=1)[0])


def test_without_cache_with_drafts_and_in_half_precision():
    check_other_loops(pair(beta=0.0)[0])
    check_half_precision(pair()[0])


def test_one_forward_per_step():
    check_one_pass(pair()[0])


def test_the_gate_of_a_row_is_its_own():
    """Rows of one batch fall on both sides of a threshold between their distances."""
    zoo, eager = build("llava"), build("llava", attn="eager")
    inputs = zoo.inputs(batch=2)
    seen = NaiveReading(eager.model, inputs, lambda row: row.logits).seen(inputs["input_ids"][:, :0])
    both = [only(1.0, 0.0, gamma, 0.0, 0) for gamma in (0.0, 3.0)]
    distances = []
    for row in seen:
        # With a_neg = 0 the contrast is the model's own prediction; what is added on the other side is the second one.
        plain, added = (rule(row) for rule in both)
        distances.append(float((plain.softmax(0) - (added - plain).softmax(0)).abs().sum()))
    between = sum(distances) / 2
    assert min(distances) + 1e-3 < between < max(distances) - 1e-3
    check_logits("llava", *pair(gamma=between, beta=0.0), images=1)


def test_a_row_without_an_image_stays_as_it_is():
    method, rule = pair()
    check_logits("llava", method, rule, images=[0, 1])
    zoo = build("llava")
    for images in ([0, 1], [0, 0]):
        inputs = zoo.inputs(batch=2, images=images)
        plain, out = (wrapped(zoo, inputs, given) for given in ("decoding-identity", method))
        # Row by row the same numbers, for the batch is the same.
        assert torch.equal(torch.stack(plain.logits)[:, 0], torch.stack(out.logits)[:, 0])


def test_without_strength_what_is_left_is_the_cut():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    (plain,) = wrapped(zoo, inputs, "decoding-identity", steps=1).logits
    (out,) = wrapped(zoo, inputs, Only(a_pos=0, a_neg=0), steps=1).logits
    kept = plausible(plain, 0.1)
    assert torch.equal(out.isfinite(), kept)
    assert torch.equal(out[kept], plain[kept])
    for mode in MODES.values():
        torch.manual_seed(0)
        plain = zoo.model.generate(**inputs, max_new_tokens=3, **mode)
        with lmmhooks.wrap(zoo.model, Only(a_pos=0, a_neg=0, beta=0.0)) as patch:
            assert patch.attached == []
            torch.manual_seed(0)
            assert torch.equal(zoo.model.generate(**inputs, max_new_tokens=3, **mode), plain)


def test_a_decode_row_is_the_last_row_of_a_full_prefill():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs()
    out = wrapped(zoo, inputs, pair()[0])
    with torch.no_grad(), lmmhooks.wrap(zoo.model, pair()[0]):
        for step, logits in enumerate(out.logits):
            grown = dict(inputs)
            grown["input_ids"] = out.sequences[:, : inputs["input_ids"].shape[1] + step]
            for name in ("attention_mask", "mm_token_type_ids"):
                new = torch.full((1, step), int(name == "attention_mask")).to(inputs[name])
                grown[name] = torch.cat([inputs[name], new], dim=1)
            torch.testing.assert_close(zoo.model(**grown).logits[:, -1], logits, atol=5e-5, rtol=0)


def test_the_layer_itself_and_what_follows_are_untouched():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    outputs = []
    hook = zoo.model.model.language_model.register_forward_hook(lambda m, a, o: outputs.append(o.last_hidden_state))
    with torch.no_grad():
        zoo.model(**inputs)
        with lmmhooks.wrap(zoo.model, pair()[0]):
            zoo.model(**inputs)
    hook.remove()
    assert torch.equal(*outputs)


def test_parts_of_the_last_block_are_used_without_what_others_hang_on_them():
    """memvr edits what feed-forward parts return; the text-leaning prediction is to be made of the plain ones."""
    zoo = build("llava")
    calls = []
    last = zoo.model.model.language_model.layers[-1]
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in (last.mlp, last.input_layernorm)]
    wrapped(zoo, zoo.inputs(), pair()[0], steps=2, min_new_tokens=2)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2 * 2


def test_outliers():
    weights = torch.tensor([[[0.3, 0.05, 0.05, 0.05, 0.35, 0.1, 0.1]]])
    among = torch.tensor([[False, True, True, True, True, False, False]])
    # Mean 0.125, unbiased standard deviation 0.15: of the part, only 0.35 stands out; 0.3 outside it stays.
    expected = weights.clone()
    expected[..., 4] = 0
    assert torch.equal(without_outliers(weights, among), expected)
    alone = torch.tensor([[True, False, False, False, False, False, False]])
    assert torch.equal(without_outliers(weights, alone), weights)


def test_entropy_of_an_empty_part_is_what_was_said():
    weights = torch.tensor([[[0.25, 0.25, 0.5, 0.0]]])
    half = torch.tensor([[True, True, False, False]])
    assert float(entropy_of(weights, half, 0.0)) == pytest.approx(-math.log(0.5 + 1e-6))
    gone = torch.tensor([[False, False, False, True]])
    assert float(entropy_of(weights, gone, 0.0)) == 0
    assert float(entropy_of(weights, gone, math.inf)) == math.inf


def test_heads_that_lean_to_the_image_go_and_some_head_stays():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(6, 8, 20, generator=generator).square()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    image = torch.zeros(6, 20, dtype=torch.bool)
    image[:, 4:12] = True
    text = ~image
    text[:, 0] = False
    edited = text_leaning(weights, text, image)
    gone = (edited == 0).all(dim=-1)
    assert ((gone.sum(dim=1) > 0) & (gone.sum(dim=1) < 8)).all()
    # The first token is of neither part.
    assert torch.equal(edited[..., 0][~gone], weights[..., 0][~gone])
    same = weights[:, :1].expand(-1, 8, -1)
    assert not (text_leaning(same, text, image) == 0).all(dim=-1).any(), "equal heads all stay"


def test_groups_of_heads_share_values():
    generator = torch.Generator().manual_seed(0)
    weights, value = torch.rand(2, 4, 5, generator=generator), torch.rand(2, 2, 5, 3, generator=generator)
    repeated = value.repeat_interleave(2, dim=1)
    expected = torch.cat([torch.einsum("bn,bnd->bd", weights[:, h], repeated[:, h]) for h in range(4)], dim=1)
    torch.testing.assert_close(head_outputs(weights, value), expected)


@pytest.mark.parametrize(
    "settings", [{"a_pos": -1}, {"a_neg": -1}, {"gamma": -0.1}, {"layer": -1}, {"beta": 2}], ids=lambda s: next(iter(s))
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"only: {next(iter(settings))}="):
        Only(**settings)


def test_models_that_lack_the_layer_or_its_parts_are_refused():
    zoo = build("llava")
    with pytest.raises(MethodError, match=r"layer must be in 0 \.\.\. 3"):
        lmmhooks.wrap(zoo.model, Only(layer=4))
    del zoo.model.model.language_model.layers[-1].post_attention_layernorm
    with pytest.raises(ModelError, match="no norm before its feed-forward module"):
        lmmhooks.wrap(zoo.model, Only())


def test_presets_and_nothing_to_be_lazy_about():
    assert lmmhooks.method("only", preset="mme") == Only(gamma=0.25, beta=0.4)
    with pytest.raises(MethodError, match="no hyper-parameter 'lazy'"):
        lmmhooks.method("only", lazy=True)
