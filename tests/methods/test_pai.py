"""PAI against its naive rendering: boost, guidance, both, and the first token of the release."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.family import resolve
from lmmhooks.methods.attention.boosting import boost
from lmmhooks.methods.attention.pai import Pai
from lmmhooks.methods.decoding.pai_guidance import PaiGuidance
from tests.methods.boosts import generated, image_keys, naive_logits, spy_on_strengths
from tests.reference.attention import full_logits
from tests.reference.boosts import boosted, guided
from tests.reference.decoding import without_image
from tests.zoo import FAMILIES, build

# float32 through four layers in another summation order; largest difference seen is 4e-6.
TOLERANCE = 1e-5
STEPS = 3


def naive_boost(zoo, inputs, alpha, layers, first_row=None):
    strengths = [dict.fromkeys(keys, alpha) for keys in image_keys(zoo, inputs)]
    return boosted(strengths, inputs["input_ids"].shape[1], layers, first_row)


@pytest.mark.parametrize("family", FAMILIES)
def test_boost_equals_the_naive_rendering_at_prefill_and_decode(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=[2, 1])
    with lmmhooks.wrap(zoo.model, Pai(alpha=0.6, gamma=1.0, start=1, end=3)):
        answer, logits = generated(zoo, inputs, STEPS)
    expected = naive_logits(zoo, inputs, naive_boost(zoo, inputs, 0.6, [1, 2]), answer)
    plain = naive_logits(zoo, inputs, None, answer)
    assert (expected - plain).abs().amax(dim=(0, 2)).min() > 1e-2, "a boost that changes no step proves nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("compat", ["paper", "release"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_boost_and_guidance_equal_two_separate_readings(family, compat, lazy):
    """The reading without image is an unpatched one, so no boost there; the release boosts from the second token on."""
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    method = Pai(alpha=0.6, gamma=1.5, plausibility=0.02, start=0, compat=compat, lazy=lazy)
    with lmmhooks.wrap(zoo.model, method):
        answer, logits = generated(zoo, inputs, STEPS)
    prompt = inputs["input_ids"].shape[1]
    first_row = prompt if compat == "release" else None
    main = naive_logits(zoo, inputs, naive_boost(zoo, inputs, 0.6, range(4), first_row), answer)
    plain = naive_logits(zoo, inputs, None, answer)
    assert ((main - plain)[:, 0].abs().max() > 1e-2) == (compat == "paper")
    assert (main - plain)[:, 1].abs().max() > 1e-2
    text = full_logits(zoo.model, without_image(inputs, resolve(zoo.model).visual_ids), answer[:, :-1])[:, -STEPS:]
    for row in range(2):
        for step in range(STEPS):
            # Logits are known up to a constant per row. Weights 1.5 and -0.5 double errors; largest seen: 9e-6.
            expected = guided(main[row, step], text[row, step], 1.5, 0.02)
            torch.testing.assert_close(logits[row, step].log_softmax(-1), expected, atol=2 * TOLERANCE, rtol=0)
            assert torch.equal(logits[row, step].isfinite(), expected.isfinite())
            assert not expected.isfinite().all(), "a cut that drops nothing proves nothing"


def test_the_boost_is_zero_in_every_row_without_image(monkeypatch):
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs(batch=3, images=[1, 0, 2])
    seen = spy_on_strengths(monkeypatch)
    with lmmhooks.wrap(zoo.model, Pai(alpha=0.6, gamma=1.5, start=0)):
        generated(zoo, inputs, STEPS)
    assert len(seen) == 4 * STEPS
    for strength in seen:
        assert strength.shape[0] == 6, "three rows and their readings without image"
        assert strength.any(dim=1).tolist() == [True, False, True, False, False, False]


def test_a_row_without_image_is_predicted_as_if_nothing_were_attached():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[1, 0])
    with torch.no_grad():
        plain = zoo.model(**inputs).logits[:, -1]
        with lmmhooks.wrap(zoo.model, Pai(alpha=0.9, gamma=1.0, start=0)):
            patched = zoo.model(**inputs).logits[:, -1]
    torch.testing.assert_close(patched[1], plain[1], atol=TOLERANCE, rtol=0)
    assert (patched[0] - plain[0]).abs().max() > 1e-2


def test_only_the_last_row_of_the_prompt_changes():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Pai(alpha=0.9, gamma=1.0, start=0)):
            patched = zoo.model(**inputs).logits
    assert torch.equal(patched[:, :-1], plain[:, :-1])
    assert not torch.equal(patched[:, -1], plain[:, -1])


def test_boost_never_lowers_a_logit_and_leaves_other_keys_bit_for_bit():
    scores = torch.randn(2, 3, 1, 8, generator=torch.Generator().manual_seed(0)) * 5
    scores[..., 7] = torch.finfo(torch.float32).min
    strength = torch.tensor([[0, 0.5, 1.0, 0, 0.2, 0, 0, 0], [0] * 8])
    out = boost(scores.clone(), strength)
    assert (out >= scores).all()
    untouched = (strength == 0)[:, None, None].expand_as(out)
    assert torch.equal(out[untouched], scores[untouched])
    positive, negative = scores[0, :, 0, 1].clamp(min=0), scores[0, :, 0, 1].clamp(max=0)
    torch.testing.assert_close(out[0, :, 0, 1], 1.5 * positive + 0.5 * negative)
    # At 1 negative logits end at 0: the order of two image keys never turns around.
    assert (out[0, :, 0, 2] >= 0).all()


def test_without_strength_nothing_is_attached():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        for method in (Pai(alpha=0.0, gamma=1.0), Pai(alpha=0.5, gamma=1.0, compat="release")):
            assert method.is_identity
            with lmmhooks.wrap(zoo.model, method) as patch:
                assert patch.attached == []
                assert torch.equal(zoo.model(**inputs).logits, plain)


def test_parts_are_boost_and_guidance():
    def parts(**settings):
        return [part.id for part in Pai(**settings).parts()]

    assert parts() == ["pai", "pai-guidance"]
    assert parts(gamma=1.0) == ["pai"]
    assert parts(alpha=0.0) == ["pai-guidance"]
    guidance = Pai(gamma=1.3, plausibility=0.2, lazy=True).parts()[1]
    assert guidance == PaiGuidance(gamma=1.3, beta=0.2, lazy=True)


def test_guidance_alone_equals_the_guidance_of_pai():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    answers = []
    for method in (Pai(alpha=0.0, gamma=1.5), PaiGuidance(gamma=1.5)):
        with lmmhooks.wrap(zoo.model, method):
            answers.append(generated(zoo, inputs, STEPS)[1])
    assert torch.equal(*answers)


@pytest.mark.parametrize("reducer", ["fastervlm(keep=5)", "random(keep=4)", "fastv(keep=4)"])
def test_after_a_reduction_the_image_keys_that_are_left_are_boosted(reducer, monkeypatch):
    zoo = build("llava")
    inputs = zoo.inputs(batch=2, images=[2, 1])
    seen = spy_on_strengths(monkeypatch)
    with lmmhooks.wrap(zoo.model, reducer, Pai(alpha=0.6, gamma=1.5, start=3)) as patch:
        generated(zoo, inputs, STEPS)
        kept = patch._runtime.last_state.stages[-1].layout.visual
    assert len(seen) == STEPS
    assert kept.sum() < 48
    for strength in seen:
        torch.testing.assert_close(strength[:, : kept.shape[1]], 0.6 * kept[:, : strength.shape[1]])


def test_composes_with_a_decoding_method_only_without_guidance():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with lmmhooks.wrap(zoo.model, Pai(alpha=0.6, gamma=1.0, start=0), "vcd(beta=0.0)"):
        _, both = generated(zoo, inputs, STEPS)
    with lmmhooks.wrap(zoo.model, "vcd(beta=0.0)"):
        _, alone = generated(zoo, inputs, STEPS)
    assert both.isfinite().all()
    assert (both - alone)[:, 0].abs().max() > 1e-2
    with pytest.raises(MethodError, match="next-token logits"):
        lmmhooks.wrap(zoo.model, "pai", "vcd")


@pytest.mark.parametrize("other", ["fix-imbalance", "heads-guided", "vaf"])
def test_two_boosts_of_the_same_keys_are_refused(other):
    with pytest.raises(MethodError, match="same image keys"):
        lmmhooks.wrap(build("llava").model, "pai", other)


def test_two_prompts_in_a_row_do_not_meet():
    zoo = build("llava")
    first, second = zoo.inputs(batch=2, seed=1), zoo.inputs(batch=1, seed=2)
    method = Pai(alpha=0.6, compat="release")
    with lmmhooks.wrap(zoo.model, method):
        generated(zoo, first, STEPS)
        _, after_another = generated(zoo, second, STEPS)
    with lmmhooks.wrap(zoo.model, method):
        _, fresh = generated(zoo, second, STEPS)
    assert torch.equal(after_another, fresh)


class Shape:
    """What the published settings depend on."""

    def __init__(self, name, hidden_size, num_layers):
        self.name, self.hidden_size, self.num_layers = name, hidden_size, num_layers


def test_published_settings():
    assert Pai.defaults_for(Shape("llava", 4096, 32)) == {"alpha": 0.5}
    assert Pai.defaults_for(Shape("qwen2_5_vl", 3584, 28)) == {}
    assert Pai().bind(Shape("llava", 4096, 32)).settings() == {
        "start": 2,
        "end": 32,
        "gamma": 1.1,
        "plausibility": 0.1,
        "lazy": False,
        "compat": "paper",
        "alpha": 0.2,
    }
    assert list(Pai().layers(Shape("", 0, 40)))[::37] == [2, 39]
    assert list(Pai(end=32).layers(Shape("", 0, 40))) == list(range(2, 32))


def test_wrap_fills_in_what_the_model_decides():
    with lmmhooks.wrap(build("llava").model, "pai") as patch:
        assert patch.methods[0].spec() == "pai(start=0, end=4, alpha=0.2)"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"alpha": 1.2}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"gamma": -1}, "gamma"),
        ({"plausibility": 2.0}, "plausibility"),
        ({"plausibility": 0.0, "lazy": True}, "lazy"),
        ({"compat": "paper2"}, "compat"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(MethodError, match=f"pai: {name}="):
        Pai(**settings)


@pytest.mark.parametrize(("settings", "name"), [({"start": 4}, "start"), ({"start": -1}, "start"), ({"end": 5}, "end")])
def test_layers_outside_the_model_are_refused_at_wrap(settings, name):
    with pytest.raises(MethodError, match=f"pai: {name}="):
        lmmhooks.wrap(build("llava").model, Pai(**settings))
