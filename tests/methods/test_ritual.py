"""RITUAL against separate forwards on transformed pixels, and its transforms against PIL's and against loops."""

from __future__ import annotations

import colorsys
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.decoding.context import CLIP_MEAN, CLIP_STD, BranchContext
from lmmhooks.methods.decoding.ritual import Ritual
from lmmhooks.methods.decoding.transforms import (
    TRANSFORMS,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blurred,
    draw_box,
    rotated,
)
from tests.methods.readings import FAMILIES, MODES, check_logits, check_tokens, composes, lazily_the_same
from tests.reference.decoding import changed_inputs, generator_of
from tests.zoo import build

ALPHA, BETA = 3.0, 0.02


def naive(alpha=ALPHA, beta=BETA):
    """The formula, token by token."""

    def combine(main, others, step):
        cut = float(main.max()) + (math.log(beta) if beta else -math.inf)
        pairs = zip(main.tolist(), others[0].tolist(), strict=True)
        return torch.tensor([plain + alpha * other if plain >= cut else -math.inf for plain, other in pairs])

    return combine


def transformed(image: Tensor) -> Tensor:
    """One image as the method shows it with seed 0: drawn, and applied to RGB."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    generator = generator_of(image, 0, "transformed")
    name = list(TRANSFORMS)[int(torch.randint(6, (), generator=generator))]
    rgb, _ = TRANSFORMS[name]((image * std + mean).clamp(0, 1), generator)
    return (rgb - mean) / std


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_forwards(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2, images=(2, 1))
    others = [changed_inputs(zoo, inputs, transformed)]
    check_logits(zoo, inputs, Ritual(beta=BETA), others, naive())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_generates_the_tokens_of_the_naive_rendering(family, mode):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    others = [changed_inputs(zoo, inputs, transformed)]
    check_tokens(zoo, inputs, Ritual(beta=BETA), others, naive(), mode)


def test_a_fixed_transform_is_applied_to_the_pixels():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    # Within [0, 1] nothing is clipped, and a flip is exact.
    inputs["pixel_values"] = inputs["pixel_values"].clamp(-1, 1)
    others = [changed_inputs(zoo, inputs, lambda image: image.flip(-1))]
    check_logits(zoo, inputs, Ritual(beta=BETA, transform="horizontal_flip"), others, naive())


def test_lazy_branches_change_nothing():
    zoo = build("llava")
    lazily_the_same(zoo, zoo.inputs(batch=2), Ritual(beta=0.6), Ritual(beta=0.6, lazy=True))


def test_composes():
    zoo = build("llava")
    composes(zoo, zoo.inputs(batch=2), "ritual(beta=0.0)")


@pytest.mark.parametrize("lazy", [False, True])
def test_what_was_drawn_is_noted_and_depends_on_the_image_and_the_seed_alone(lazy):
    zoo = build("llava")
    notes = {}
    for name, inputs in (("both", zoo.inputs(batch=2)), ("second", zoo.row(zoo.inputs(batch=2), 1))):
        for seed in range(4):
            with lmmhooks.wrap(zoo.model, Ritual(seed=seed, beta=1e-30, lazy=lazy)) as patch:
                zoo.model.generate(**inputs, max_new_tokens=2, do_sample=False)
                notes[name, seed] = patch.stats.notes
    assert [note["image"] for note in notes["both", 0]] == [0, 1]
    assert {note["transform"] for seed in range(4) for note in notes["both", seed]} <= set(TRANSFORMS)
    assert len({note["transform"] for seed in range(4) for note in notes["both", seed]}) > 1
    for seed in range(4):
        assert notes["second", seed] == ({**notes["both", seed][1], "image": 0},)


def test_strength_zero_and_beta_one():
    zoo = build("llava")
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        plain = zoo.model(**inputs).logits
        with lmmhooks.wrap(zoo.model, Ritual(alpha=0.0, beta=0.3)) as patch:
            cut = zoo.model(**inputs).logits
            assert patch.stats.branches == 1
        assert torch.equal(cut[cut.isfinite()], plain[cut.isfinite()])
    assert Ritual(alpha=0.0, beta=0.0).is_identity
    greedy = zoo.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with lmmhooks.wrap(zoo.model, Ritual(beta=1.0)):
        assert torch.equal(zoo.model.generate(**inputs, max_new_tokens=4, do_sample=True), greedy)


def test_pixels_are_brought_to_rgb_by_the_processor_s_mean_and_deviation():
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.25] * 3))
    known, assumed = BranchContext(None, processor), BranchContext(None)
    pixels = torch.full((1, 3, 20, 20), 0.4)
    torch.testing.assert_close(known.to_rgb(pixels), torch.full((1, 3, 20, 20), 0.6))
    assert known.knows_normalisation
    assert not assumed.knows_normalisation
    for context in (known, assumed):
        torch.testing.assert_close(context.from_rgb(context.to_rgb(pixels)), pixels)
    # Black, where a rotated image leaves a corner empty, is not 0 in normalised pixels.
    corner = Ritual(transform="rotation", seed=1).transform_pixels(
        pixels, None, torch.Generator().manual_seed(0), known
    )[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.full((3,), -2.0))


# -- transforms --------------------------------------------------------------------------------------------------------


def picture(height=24, width=32):
    """Random blocks in RGB, ``[1, 3, H, W]``, of values that eight bits hold."""
    blocks = torch.randint(256, (1, 3, height // 4, width // 4), generator=torch.Generator().manual_seed(0))
    return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3).float() / 255


def as_pil(rgb):
    return Image.fromarray((rgb[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def as_tensor(image):
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 255


def test_flips_are_pil_s():
    rgb = picture()
    for name, expected in (("horizontal_flip", ImageOps.mirror), ("vertical_flip", ImageOps.flip)):
        out, _ = TRANSFORMS[name](rgb, torch.Generator())
        torch.testing.assert_close(out, as_tensor(expected(as_pil(rgb))))


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, -135.0, 179.0])
def test_rotation_is_pil_s(angle):
    rgb = picture()
    out, expected = rotated(rgb, angle), as_tensor(as_pil(rgb).rotate(angle))
    same = (out - expected).abs().amax(dim=1) < 1e-3
    # On a line between two pixels rounding decides which of them is the nearest.
    assert same.float().mean() > 0.95


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize(
    ("adjust", "enhancer"),
    [
        (adjust_brightness, ImageEnhance.Brightness),
        (adjust_contrast, ImageEnhance.Contrast),
        (adjust_saturation, ImageEnhance.Color),
    ],
)
def test_jitter_is_pil_s(adjust, enhancer, factor):
    rgb = picture()
    expected = as_tensor(enhancer(as_pil(rgb)).enhance(factor))
    # PIL rounds the grey value, and the result, to eight bits.
    torch.testing.assert_close(adjust(rgb, factor), expected, atol=2.1 / 255, rtol=0)


@pytest.mark.parametrize("shift", [0.0, 0.2, -0.5, 0.5])
def test_hue_is_that_of_colorsys(shift):
    rgb = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    rgb[0, :, 0, 0] = 0.5  # grey has no hue
    rgb[0, :, 0, 1] = 0.0
    out = adjust_hue(rgb, shift)
    for row in range(5):
        for col in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb[0, :, row, col].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
            torch.testing.assert_close(out[0, :, row, col], expected, atol=1e-5, rtol=0)


def test_blur_is_a_weighted_mean_of_mirrored_pixels():
    rgb, sigma = picture(16, 16), 1.7
    weights = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(-6, 7)]
    out = blurred(rgb, 13, sigma)
    for row, col in ((0, 0), (3, 12), (15, 7)):
        total = torch.zeros(3)
        for dy in range(-6, 7):
            for dx in range(-6, 7):
                y, x = (15 - abs(15 - abs(place)) for place in (row + dy, col + dx))
                total += weights[dy + 6] * weights[dx + 6] * rgb[0, :, y, x]
        torch.testing.assert_close(out[0, :, row, col], total / sum(weights) ** 2, atol=1e-5, rtol=0)


def test_boxes_lie_in_the_image_and_have_the_area_and_ratio_asked_for():
    generator = torch.Generator().manual_seed(0)
    areas = []
    for _ in range(300):
        top, left, height, width = draw_box(100, 140, generator)
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 140 - width
        assert 3 / 4 - 0.05 < width / height < 4 / 3 + 0.05
        areas.append(height * width / 14000)
    # Sides are rounded to pixels.
    assert 0.07 < min(areas) < 0.12
    assert 0.85 < max(areas) < 1.01


def test_an_image_that_no_box_fits_gives_its_largest_one():
    top, left, height, width = draw_box(10, 1000, torch.Generator().manual_seed(0))
    assert (top, height, width) == (0, 10, 13)
    assert left == (1000 - 13) // 2


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_keep_shape_and_range_and_are_drawn_from_the_generator(name):
    rgb = picture(16, 12).expand(2, -1, -1, -1)
    out, parameters = TRANSFORMS[name](rgb, torch.Generator().manual_seed(3))
    again, same = TRANSFORMS[name](rgb, torch.Generator().manual_seed(3))
    assert out.shape == rgb.shape
    assert torch.equal(out, again)
    assert parameters == same
    assert torch.equal(out[0], out[1]), "all crops are transformed alike"
    assert -1e-6 <= float(out.min()) <= float(out.max()) <= 1 + 1e-6
    assert not torch.equal(out, rgb)


@pytest.mark.parametrize("settings", [{"alpha": -1}, {"transform": "blur"}, {"seed": -1}, {"beta": -0.1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"ritual: {next(iter(settings))}="):
        Ritual(**settings)
