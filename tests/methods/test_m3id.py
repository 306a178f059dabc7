"""M3ID against forwards of their own with and without image, and the closed form of its correction."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.family import resolve
from lmmhooks.methods.decoding.m3id import M3id, correction, unsure
from tests.methods.readings import FAMILIES, MODES, check_logits, check_tokens, composes, lazily_the_same
from tests.reference.decoding import without_image
from tests.zoo import build

SETTINGS = {"lam": 0.4, "t0": 1, "beta": 0.02}


def naive(lam, t0, beta, max_c=math.inf, gate=None):
    """The formula, token by token."""

    def combine(main, others, step):
        share = math.exp(-lam * (t0 + step))
        c = min((1 - share) / share, max_c)
        if gate is not None and math.log(gate) <= float(main.log_softmax(-1).max()):
            c = 0.0
        cut = float(main.max()) + math.log(beta) if beta else -math.inf
        pairs = zip(main.tolist(), others[0].tolist(), strict=True)
        return torch.tensor([(1 + c) * with_ - c * without if with_ >= cut else -math.inf for with_, without in pairs])

    return combine


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [{}, {"max_c": 1.0, "gate": 0.2}], ids=["plain", "capped and gated"])
def test_equals_separate_forwards(family, extra):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    others = [without_image(inputs, resolve(zoo.model).visual_ids)]
    check_logits(zoo, inputs, M3id(**SETTINGS, **extra), others, naive(**SETTINGS, **extra))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    others = [without_image(inputs, resolve(zoo.model).visual_ids)]
    check_tokens(zoo, inputs, M3id(**SETTINGS), others, naive(**SETTINGS), mode)


def test_lazy_branches_change_nothing():
    zoo = build("llava")
    lazily_the_same(zoo, zoo.inputs(batch=2), M3id(lam=0.4, beta=0.6), M3id(lam=0.4, beta=0.6, lazy=True))


def test_composes():
    zoo = build("llava")
    composes(zoo, zoo.inputs(batch=2), "m3id(lam=0.4, beta=0.0)")


def test_with_t0_of_0_the_first_token_is_the_model_s_own():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, lmmhooks.method("m3id", preset="ritual", lam=5.0, beta=0.0)):
            first = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, M3id(lam=5.0, beta=0.0)):
            corrected = zoo.model(**inputs).logits[:, -1]
    # The same numbers from a batch with two more rows.
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=0)
    assert (corrected - plain).abs().max() > 1


def test_without_forgetting_what_is_left_is_the_plausibility_cut():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, M3id(lam=0.0, beta=0.3)) as patch:
            cut = zoo.model(**inputs).logits
            assert patch.stats.branches == 1
    kept = cut.isfinite()
    assert torch.equal(cut[kept], plain[kept])
    assert torch.equal(kept, plain >= plain.amax(-1, keepdim=True) + math.log(0.3))
    assert M3id(lam=0.0, beta=0.0).is_identity


def test_a_row_without_image_is_not_corrected():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=(0, 1))
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, M3id(lam=2.0, beta=0.0)):
            out = zoo.model(**inputs).logits[:, -1]
    # Weights of up to 7 on float32 sums in another order.
    torch.testing.assert_close(out[0], plain[0], atol=5e-5, rtol=0)
    assert (out[1] - plain[1]).abs().max() > 0.1


def test_correction():
    # The sheet's figures: two digits.
    for t, expected in ((10, 0.22), (50, 1.7), (100, 6.4), (167, 27)):
        assert correction(t, 0.02, None) == pytest.approx(expected, rel=0.03)
    assert correction(0, 0.02, None) == 0
    assert correction(100, 0.02, 1.5) == 1.5
    assert math.isfinite(correction(10**6, 0.02, None))


def test_gate_is_per_row():
    main = torch.tensor([[5.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    assert unsure(main, 0.5).tolist() == [[False], [True]]
    assert unsure(main, 1.0).tolist() == [[True], [True]]


@pytest.mark.parametrize(
    "settings", [{"lam": -1}, {"t0": -1}, {"max_c": 0.0}, {"gate": 0.0}, {"gate": 1.5}, {"beta": 2.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"m3id: {next(iter(settings))}="):
        M3id(**settings)
