"""Visual contrastive decoding against its naive rendering, and the invariants of its formula."""

from __future__ import annotations

import math

import pytest
import torch

import lmmhooks
from lmmhooks.compat import takes_encoder_outputs
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.base import contrast, plausible
from lmmhooks.methods.decoding.vcd import Vcd, add_noise, signal_levels
from tests.reference.decoding import NaiveBranches, naive_generate, noised_inputs, signal_level, vcd
from tests.zoo import FAMILIES, VIDEO_FAMILIES, build

# float32 through four layers and a vision tower in other batches; contrast triples it. Largest difference seen: 5e-6.
TOLERANCE = 1e-5
ALPHA, BETA, STEPS = 1.0, 0.05, 4


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_forwards_at_prefill_and_decode(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=2)
    noised = noised_inputs(zoo, inputs)
    with lmmhooks.wrap(zoo.model, Vcd(alpha=ALPHA, beta=BETA)):
        out = zoo.model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    naive = NaiveBranches(zoo.model, inputs, [noised], vcd(ALPHA, BETA))
    plain = NaiveBranches(zoo.model, inputs, [inputs], vcd(ALPHA, BETA))
    for step, logits in enumerate(out.logits):
        expected = naive.logits(answer[:, :step])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        if step == 0:
            unchanged = plain.logits(answer[:, :0])
            seen = expected.isfinite()
            assert (unchanged - expected)[seen].abs().max() > 1e-2, "noise that changes nothing proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mode",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    zoo = build(family)
    if family == "internvl" and "num_beams" in mode and not takes_encoder_outputs(zoo.model):
        pytest.skip("generate of transformers before 5.20 repeats tiles instead of images for beams")
    inputs = zoo.inputs(batch=2)
    arguments = {"max_new_tokens": STEPS, **mode}
    torch.manual_seed(0)
    expected = naive_generate(zoo.model, inputs, [noised_inputs(zoo, inputs)], vcd(ALPHA, BETA), **arguments)
    with lmmhooks.wrap(zoo.model, Vcd(alpha=ALPHA, beta=BETA)):
        torch.manual_seed(0)
        out = zoo.model.generate(**inputs, **arguments)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], expected)


def test_a_still_image_gets_the_same_noise_in_both_frames_of_a_temporal_patch():
    zoo = build("qwen2_5_vl")
    inputs = zoo.inputs()
    size = zoo.recipe.patch
    patches = inputs["pixel_values"].reshape(-1, 3, 2, size, size)
    inputs["pixel_values"] = patches[:, :, :1].expand(-1, -1, 2, -1, -1).flatten(1)
    noised = noised_inputs(zoo, inputs)
    both = noised["pixel_values"].reshape(-1, 3, 2, size, size)
    assert torch.equal(both[:, :, 0], both[:, :, 1])
    with lmmhooks.wrap(zoo.model, Vcd(alpha=ALPHA, beta=BETA)):
        logits = zoo.model(**inputs, logits_to_keep=1).logits[:, -1]
    expected = NaiveBranches(zoo.model, inputs, [noised], vcd(ALPHA, BETA)).logits(inputs["input_ids"][:, :0])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_video_is_noised(family):
    zoo = build(family)
    if family == "llava_onevision" and not takes_encoder_outputs(zoo.model):
        pytest.skip("transformers before 5.20 adds the newline of a video after its encoder call")
    inputs = zoo.inputs(images=0, videos=1)
    with torch.no_grad():
        plain = zoo.model(**inputs, logits_to_keep=1).logits[0, -1]
        with lmmhooks.wrap(zoo.model, Vcd(beta=0.0)):
            contrasted = zoo.model(**inputs, logits_to_keep=1).logits[0, -1]
    # (1 + a) L - a L' = L + a (L - L'), so what is left is the difference the noise makes.
    assert (contrasted - plain).abs().max() > 1e-2


def test_without_contrast_what_is_left_is_the_plausibility_cut():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Vcd(alpha=0.0, beta=0.3)) as patch:
            cut = zoo.model(**inputs).logits
            assert patch.stats.branches == 1
    kept = cut.isfinite()
    assert torch.equal(cut[kept], plain[kept])
    assert torch.equal(kept, plain >= plain.amax(-1, keepdim=True) + math.log(0.3))
    assert Vcd(alpha=0.0, beta=0.0).is_identity


def test_beta_one_is_greedy_decoding_whatever_alpha():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    plain = zoo.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    with lmmhooks.wrap(zoo.model, Vcd(alpha=3.0, beta=1.0)):
        assert torch.equal(zoo.model.generate(**inputs, max_new_tokens=STEPS, do_sample=True), plain)


def test_schedule():
    levels = signal_levels()
    for step in (0, 1, 500, 999):
        assert float(levels[step]) == pytest.approx(signal_level(step), rel=1e-12)
    assert bool((levels.diff() < 0).all())
    pixels = torch.full((1, 3, 200, 200), 2.0)
    noised = add_noise(pixels, 500, torch.Generator().manual_seed(0))
    # 120,000 draws: the mean and the standard deviation are known to 0.003.
    assert float(noised.mean()) == pytest.approx(2 * math.sqrt(signal_level(500)), abs=0.01)
    assert float(noised.std()) == pytest.approx(math.sqrt(1 - signal_level(500)), abs=0.01)
    assert bool((pixels == 2).all())


def test_formula():
    generator = torch.Generator().manual_seed(0)
    main, other = torch.randn(2, 5, 11, generator=generator)
    keep = plausible(main, 0.4)
    assert torch.equal(keep.any(dim=1), torch.ones(5, dtype=torch.bool))
    assert bool(keep.gather(1, main.argmax(1, keepdim=True)).all())
    assert plausible(main, 0.0) is None
    ties = torch.tensor([[1.0, 3.0, 3.0, 2.9999]])
    assert plausible(ties, 1.0).tolist() == [[False, True, True, False]]
    same = contrast([main, main], [2.0, -1.0], keep)
    torch.testing.assert_close(same[keep], main[keep])
    shifted = contrast([main + 3, other - 7], [2.0, -1.0], plausible(main + 3, 0.4))
    # A constant per row in either branch is gone after softmax; float32 of numbers up to 30.
    torch.testing.assert_close(
        shifted.softmax(-1), contrast([main, other], [2.0, -1.0], keep).softmax(-1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"beta": 1.5}, {"beta": -0.1}, {"noise_step": 1000}, {"noise_step": -1}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        Vcd(**settings)


def test_lazy_needs_a_cut():
    with pytest.raises(MethodError, match="lazy"):
        Vcd(beta=0.0, lazy=True)
