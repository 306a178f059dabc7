"""DoLa against its naive rendering, and the invariants of its choice of a layer."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.base import plausible
from lmmhooks.methods.decoding.dola import Dola
from lmmhooks.methods.decoding.early import early_layers, mixture_divergence
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
from tests.reference.layers import divergence, dola
from tests.zoo import build

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
LAYERS, BETA = (0, 1, 2, 3), 0.05
METHOD = Dola(layers=LAYERS, beta=BETA)
RULE = dola(LAYERS, BETA)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_naive_rendering(family):
    check_logits(family, METHOD, RULE)


@pytest.mark.parametrize("normed", [False, True])
def test_without_cut_raw_logits_are_subtracted(normed):
    check_logits("llava", Dola(layers=LAYERS, beta=0.0, normed=normed), dola(LAYERS, 0.0, normed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    check_tokens(family, mode, METHOD, RULE)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_composes(family):
    check_composes(family, METHOD)


def test_without_cache_with_drafts_and_in_half_precision():
    check_other_loops(Dola(layers=LAYERS, beta=0.0))
    check_half_precision(METHOD)


def test_one_forward_per_step():
    check_one_pass(METHOD)


def test_acts_on_prompts_without_an_image():
    check_logits("llava", METHOD, RULE, images=[0, 1])


def test_rows_choose_their_own_layer():
    """The release takes the mean over the batch, by which both rows would get the layer of one."""
    main = torch.zeros(2, 6)
    early = torch.zeros(2, 2, 6)
    early[0, 0, 0] = early[1, 1, 0] = 5.0
    assert mixture_divergence(main, early).argmax(dim=0).tolist() == [0, 1]


def test_one_candidate_is_always_the_one():
    check_logits("qwen2_5_vl", Dola(layers=(2,), beta=BETA), dola((2,), BETA))


def test_where_both_layers_agree_all_plausible_tokens_score_the_same():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    (plain,) = wrapped(zoo, inputs, "decoding-identity", steps=1).logits
    (out,) = wrapped(zoo, inputs, Dola(layers=(4,), beta=BETA), steps=1).logits
    kept = out.isfinite()
    assert torch.equal(kept, plausible(plain, BETA))
    assert (kept.sum(dim=1) > 1).all()
    # Twice the same logits, summed in another order.
    assert out[kept].abs().max() < 1e-5


def test_the_cut_keeps_the_most_probable_token():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = zoo.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with lmmhooks.wrap(zoo.model, Dola(beta=1.0)):
        torch.manual_seed(0)
        assert torch.equal(zoo.model.generate(**inputs, max_new_tokens=3, do_sample=True), plain)


def test_divergence():
    main, other = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0)) * 4
    keep = torch.rand(5, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    rows = zip(main.tolist(), other.tolist(), keep.tolist(), strict=True)
    for row, (p, q, kept) in enumerate(rows):
        assert float(mixture_divergence(main, other)[row]) == pytest.approx(divergence(p, q), rel=1e-4)
        part = [[value for value, k in zip(values, kept, strict=True) if k] for values in (p, q)]
        assert float(mixture_divergence(main, other, keep)[row]) == pytest.approx(divergence(*part), rel=1e-4)
    assert mixture_divergence(main, main + 3).abs().max() < 1e-6
    # Probabilities that are 0 in float32 on both sides count 0.
    far = torch.tensor([[0.0, -1e4, -2e4]])
    assert mixture_divergence(far, far + 1).abs().max() == 0


def family_of(depth: int, tied: bool = False):
    return type("Family", (), {"num_layers": depth, "ties_embeddings": tied})()


@pytest.mark.parametrize(
    ("depth", "tied", "low", "high"),
    [
        (32, False, range(0, 15, 2), range(16, 31, 2)),
        (32, True, range(2, 15, 2), range(16, 31, 2)),
        (60, False, range(0, 19, 2), range(40, 59, 2)),
        (4, False, [0], [2]),
        (4, True, [2], [2]),
        (2, True, [1], [1]),
    ],
)
def test_buckets(depth, tied, low, high):
    assert early_layers("low", family_of(depth, tied)) == tuple(low)
    assert early_layers("high", family_of(depth, tied)) == tuple(high)


def test_every_second_layer_and_the_last():
    assert early_layers("all", family_of(28)) == tuple(range(0, 29, 2))
    assert len(early_layers("all", family_of(28))) == 15
    assert early_layers("all", family_of(28, tied=True)) == tuple(range(2, 29, 2))
    assert early_layers("last", family_of(28)) == (28,)


def test_embeddings_that_are_the_head_are_left_out():
    zoo = build("llava", tie_word_embeddings=False)
    with lmmhooks.wrap(zoo.model, "dola") as patch:
        assert patch.methods[0].layers == (0,)
        assert not patch.family.ties_embeddings
    zoo.model.lm_head.weight = zoo.model.get_input_embeddings().weight
    with lmmhooks.wrap(zoo.model, "dola") as patch:
        assert patch.methods[0].layers == (2,)


@pytest.mark.parametrize(
    ("settings", "name"), [({"layers": "middle"}, "layers"), ({"layers": "all"}, "layers"), ({"beta": 2.0}, "beta")]
)
def test_settings_out_of_range_are_refused(settings, name):
    with pytest.raises(MethodError, match=f"dola: {name}="):
        Dola(**settings)


@pytest.mark.parametrize("layers", [(), (0, 5), (-1,)])
def test_layers_the_model_does_not_have_are_refused(layers):
    with pytest.raises(MethodError, match=r"layers must be in 0 \.\.\. 4"):
        lmmhooks.wrap(build("llava").model, Dola(layers=layers))


def test_there_is_nothing_to_be_lazy_about():
    with pytest.raises(MethodError, match="no hyper-parameter 'lazy'"):
        lmmhooks.method("dola", lazy=True)
