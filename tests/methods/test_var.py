"""Visual attention redistribution against its naive rendering."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import lmmhooks
from lmmhooks.methods.attention.sinks import sink_scores
from lmmhooks.methods.attention.var import Var, redistribute
from tests.reference.attention import dense_attention, full_logits, var
from tests.zoo import FAMILIES, IMAGE, build

# float32 through four layers in another summation order; largest difference seen is 2e-6.
TOLERANCE = 1e-5
# Thresholds at which the random models have both sinks and non-sinks among text and image, and gated and open rows.
SETTINGS = {"p": 0.6, "rho": 0.3, "min_visual": 0.2, "tau": 2.6}


def naive(zoo, inputs):
    skip = {0, 1, zoo.model.model.language_model.config.num_hidden_layers - 1}
    return var(0.6, 0.3, 0.2, 2.6, zoo.model.config.image_token_id, inputs["input_ids"], skip)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_rendering_at_prefill_and_decode(family):
    zoo = build(family, layers=5)
    inputs = zoo.inputs(batch=2)
    steps = 3
    with lmmhooks.wrap(zoo.model, Var(sink_dims="any", **SETTINGS)):
        out = zoo.model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    plain = full_logits(zoo.model, inputs)[:, -1]
    with dense_attention(zoo.model, naive(zoo, inputs)):
        expected = full_logits(zoo.model, inputs, answer[:, :-1])[:, -steps:]
    assert (expected[:, 0] - plain).abs().max() > 1e-2, "settings under which nothing is edited prove nothing"
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=TOLERANCE, rtol=0)


def test_rows_sum_to_one_and_only_sinks_and_visual_targets_change():
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(2, 3, 4, 10, generator=generator), dim=-1)
    visual = torch.zeros(2, 10, dtype=torch.bool)
    visual[:, 2:7] = True
    sinks = torch.zeros(2, 10, dtype=torch.bool)
    sinks[:, [0, 3]] = True
    out = redistribute(weights.clone(), sinks, visual, p=0.5, rho=0.0, min_visual=0.0)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, 4))
    torch.testing.assert_close(out[..., [0, 3]], weights[..., [0, 3]] * 0.5)
    assert torch.equal(out[..., [1, 7, 8, 9]], weights[..., [1, 7, 8, 9]])
    assert (out[..., [2, 4, 5, 6]] > weights[..., [2, 4, 5, 6]]).all()


def test_combined_outputs_equal_reweighted_rows():
    """``O + g p m_S (O_VN - O_S)``: outputs of the key sets suffice, as they come from fused kernels."""
    generator = torch.Generator().manual_seed(0)
    # Peaked rows, so that some pass both thresholds and some do not.
    weights = torch.softmax(2.5 * torch.randn(2, 4, 6, 30, generator=generator), dim=-1)
    values = torch.randn(2, 4, 30, 8, generator=generator)
    visual, sinks = torch.zeros(2, 30, dtype=torch.bool), torch.zeros(2, 30, dtype=torch.bool)
    visual[0, 4:20], visual[1, 6:22] = True, True
    sinks[0, [0, 5, 9]], sinks[1, [2, 7, 25]] = True, True

    def mass_and_output(keys):
        part = weights * keys[:, None, None, :]
        mass = part.sum(dim=-1, keepdim=True)
        return mass, part @ values / mass

    mass_sink, from_sinks = mass_and_output(sinks)
    mass_target, from_targets = mass_and_output(visual & ~sinks)
    mass_visual, _ = mass_and_output(visual)
    gate = (mass_visual >= 0.4) & (mass_target / mass_visual >= 0.8)
    assert gate.any()
    assert not gate.all()
    expected = weights @ values + gate * 0.6 * mass_sink * (from_targets - from_sinks)
    dense = redistribute(weights.clone(), sinks, visual, p=0.6, rho=0.8, min_visual=0.4) @ values
    # Two ways to add up 30 float32 products.
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_positions_up_to_the_end_of_the_image_are_bit_identical(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=1)
    end = int((inputs["input_ids"][0] == IMAGE).nonzero().max()) + 1
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Var(sink_dims="any", **SETTINGS)):
            patched = zoo.model(**inputs).logits
    assert torch.equal(patched[:, :end], plain[:, :end])
    assert not torch.equal(patched[:, -1], plain[:, -1])


@pytest.mark.parametrize("others", [("fastervlm(keep=5)",), ("random(keep=4)",), ("vcd(beta=0.0)",)], ids=str)
def test_one_sample_equals_its_row_of_a_batch_beside_other_kinds(others):
    zoo = build("llava", layers=5)
    inputs = zoo.inputs(batch=2)
    method = Var(sink_dims="any", **SETTINGS)

    def generate(inputs):
        out = zoo.model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits, dim=1)

    with lmmhooks.wrap(zoo.model, *others):
        without = generate(inputs)
    with lmmhooks.wrap(zoo.model, method, *others):
        together, alone = generate(inputs), generate(zoo.row(inputs, 1))
    assert (together - without).abs().max() > 1e-2
    # Padding changes the order of summation; largest difference of such batches seen is 8e-6.
    torch.testing.assert_close(together[1:], alone, atol=5e-5, rtol=0)


def test_a_row_whose_visual_tokens_are_all_sinks_is_left_alone():
    weights = torch.softmax(torch.randn(1, 1, 2, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    visual = torch.tensor([[False, True, True, False, False, False]])
    assert torch.equal(redistribute(weights, visual, visual, 0.6, 0.0, 0.0), weights)


def test_sink_score_is_scale_free_and_bounded():
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    score = sink_scores(hidden, [3, 9])
    torch.testing.assert_close(sink_scores(hidden * 50, [3, 9]), score, rtol=1e-4, atol=1e-5)
    hidden[0, 0] = 0
    hidden[0, 0, 9] = 1e4
    assert math.isclose(float(sink_scores(hidden, [3, 9])[0, 0]), 8.0, rel_tol=1e-4)


@pytest.mark.parametrize("settings", [{"p": 0.0}, {"rho": 1.5}, {"tau": math.inf}])
def test_strength_zero_attaches_nothing(settings):
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Var(**settings)) as patch:
            assert patch.attached == []
            assert torch.equal(zoo.model(**inputs).logits, plain)


def test_two_prompts_in_a_row_do_not_share_sinks():
    zoo = build("llava")
    method = Var(sink_dims="any", **SETTINGS)
    first, second = zoo.inputs(batch=1, seed=1), zoo.inputs(batch=1, seed=2)
    with torch.no_grad():
        with lmmhooks.wrap(zoo.model, method):
            zoo.model.generate(**first, max_new_tokens=3)
            after_another = zoo.model(**second).logits
        with lmmhooks.wrap(zoo.model, method):
            fresh = zoo.model(**second).logits
    assert torch.equal(after_another, fresh)


def test_published_channels_are_for_the_decoder_they_were_found_in():
    def family(name, width, depth, key_heads):
        return SimpleNamespace(name=name, hidden_size=width, num_layers=depth, num_kv_heads=key_heads)

    assert Var.defaults_for(family("llava", 4096, 32, 32)) == {"sink_dims": (1415, 2533)}
    assert Var.defaults_for(family("llava", 5120, 40, 40)) == {"sink_dims": (2100, 4743)}
    assert Var.defaults_for(family("qwen2_vl", 3584, 28, 4)) == {"sink_dims": (458, 2570)}
    # LLaVA on Llama-3 or Mistral is as wide and deep as on Llama-2, and groups its keys.
    assert Var.defaults_for(family("llava", 4096, 32, 8)) == {}
    assert Var.defaults_for(family("llava", 64, 4, 2)) == {}


@pytest.mark.parametrize(
    ("preset", "p", "rho"),
    [("paper", 0.6, 0.8), ("hallucination", 0.6, 0.5), ("vision-centric", 0.6, 0.9), ("released_yaml", 0.4, 0.5)],
)
def test_presets_name_the_published_settings(preset, p, rho):
    settings = lmmhooks.method("var", preset=preset).settings()
    assert (settings["p"], settings["rho"], settings["min_visual"]) == (p, rho, 0.2)


def test_settings_beside_a_preset_win():
    assert lmmhooks.methods.resolve("var(preset='hallucination', p=0.2)").spec() == "var(p=0.2, rho=0.5)"


@pytest.mark.parametrize("settings", [{"p": 1.2}, {"rho": -0.1}, {"min_visual": 2}, {"tau": 0}])
def test_values_out_of_range_are_refused_by_name(settings):
    name = next(iter(settings))
    with pytest.raises(lmmhooks.MethodError, match=name):
        lmmhooks.method("var", **settings)


def test_channels_outside_the_model_are_refused_at_wrap():
    with pytest.raises(lmmhooks.MethodError, match="sink_dims"):
        lmmhooks.wrap(build("llava").model, Var(sink_dims=(1415, 2533)))
