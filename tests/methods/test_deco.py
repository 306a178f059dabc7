"""DeCo against its naive rendering, and the invariants of its candidates and its choice of a layer."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.deco import Deco, candidates, surest_layer
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
from tests.reference.layers import deco, shares
from tests.zoo import build

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
ALPHA, LAYERS, SHARE, MOST = 0.9, (1, 2, 3), 0.8, 15
METHOD = Deco(alpha=ALPHA, layers=LAYERS, threshold_top_p=SHARE, threshold_top_k=MOST)
RULE = deco(ALPHA, LAYERS, SHARE, MOST)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_naive_rendering(family):
    check_logits(family, METHOD, RULE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, mode, METHOD, RULE)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_composes(family):
    check_composes(family, METHOD)


def test_without_cache_with_drafts_and_in_half_precision():
    check_other_loops(Deco(alpha=ALPHA, layers=LAYERS, threshold_top_p=1.0, threshold_top_k=0))
    check_half_precision(METHOD)


def test_one_forward_per_step():
    check_one_pass(METHOD)


def test_acts_on_prompts_without_an_image():
    check_logits("llava", METHOD, RULE, images=[0, 1])


def test_without_correction_what_is_left_is_the_candidate_set():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = wrapped(zoo, inputs, "decoding-identity")
    cut = wrapped(zoo, inputs, Deco(alpha=0.0))
    assert torch.equal(cut.sequences, plain.sequences)
    for logits, main in zip(cut.logits, plain.logits, strict=True):
        kept = logits.isfinite()
        assert torch.equal(kept, candidates(main, 20, 0.9))
        assert torch.equal(logits[kept], main[kept])
    with lmmhooks.wrap(zoo.model, Deco(alpha=0.0)) as patch:
        assert not any("(read)" in entry for entry in patch.attached)


def test_without_correction_and_cut_nothing_is_attached():
    method = Deco(alpha=0.0, threshold_top_p=1.0, threshold_top_k=0)
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    for mode in MODES.values():
        torch.manual_seed(0)
        plain = zoo.model.generate(**inputs, max_new_tokens=3, **mode)
        with lmmhooks.wrap(zoo.model, method) as patch:
            assert patch.attached == []
            torch.manual_seed(0)
            assert torch.equal(zoo.model.generate(**inputs, max_new_tokens=3, **mode), plain)


def test_the_last_layer_scales_its_own_candidates():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=2)
    plain = wrapped(zoo, inputs, "decoding-identity")
    out = wrapped(zoo, inputs, Deco(alpha=0.5, layers=(4,)))
    assert torch.equal(out.sequences, plain.sequences)
    for logits, main in zip(out.logits, plain.logits, strict=True):
        kept = logits.isfinite()
        scaled = (1 + 0.5 * main.softmax(-1).amax(-1, keepdim=True)) * main
        torch.testing.assert_close(logits[kept], scaled[kept], atol=5e-5, rtol=0)


def test_candidates():
    main = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * 3
    for most, share in ((20, 0.9), (3, 0.9), (0, 0.5), (60, 0.99), (5, 1.0), (20, 0.0)):
        found = candidates(main, most, share)
        for row, kept in zip(main.tolist(), found, strict=True):
            probs = shares(row)
            expected, total = set(), 0.0
            for token in sorted(range(60), key=lambda token: -probs[token])[: most or 60]:
                expected.add(token)
                total += probs[token]
                if total >= share and share < 1:
                    break
            assert set(kept.nonzero().flatten().tolist()) == expected
    assert candidates(main, 0, 1.0) is None


def test_of_equally_probable_tokens_the_lower_index_is_a_candidate():
    main = torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 3.0, 3.0]])
    assert candidates(main, 3, 1.0).tolist() == [[True, True, True, False, False], [True, False, False, True, True]]
    assert candidates(main, 2, 1.0).tolist() == [[True, True, False, False, False], [True, False, False, True, False]]


def test_of_equally_sure_layers_the_first_is_chosen():
    early = torch.tensor([[[0.0, 1.0, 5.0]], [[2.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]]])
    keep = torch.tensor([[True, True, False]])
    layer, confidence = surest_layer(early, keep)
    assert layer.tolist() == [1]
    assert float(confidence) == pytest.approx(math.exp(2) / (math.exp(2) + 2))
    assert surest_layer(early, None)[0].tolist() == [0]


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, range(20, 29)), (4, range(2, 4)), (28, range(18, 25)), (1, range(1, 2))]
)
def test_layers_are_scaled_with_the_depth(depth, layers):
    family = type("Family", (), {"num_layers": depth})()
    assert Deco().bind(family).layers == tuple(layers)


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"threshold_top_p": 1.5}, {"threshold_top_p": -0.1}, {"threshold_top_k": -1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"deco: {next(iter(settings))}="):
        Deco(**settings)


@pytest.mark.parametrize("layers", [(), (0, 5), (-1,)])
def test_layers_the_model_does_not_have_are_refused(layers):
    with pytest.raises(MethodError, match=r"layers must be in 0 \.\.\. 4"):
        lmmhooks.wrap(build("llava").model, Deco(layers=layers))


def test_there_is_no_cut_and_nothing_to_be_lazy_about():
    with pytest.raises(MethodError, match="no hyper-parameter 'beta'"):
        lmmhooks.method("deco", beta=0.1)
    with pytest.raises(MethodError, match="no hyper-parameter 'lazy'"):
        lmmhooks.method("deco", lazy=True)
