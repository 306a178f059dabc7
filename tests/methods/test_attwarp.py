"""AttWarp: sampling positions and pixels against loops, chains against warps one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.refinement.attwarp import AttWarp, divergence, positions
from lmmhooks.methods.refinement.operators import warped
from lmmhooks.methods.refinement.warping import (
    TRANSFORMS,
    backwards,
    capped,
    densities,
    forwards,
    knots,
    magnification,
)
from lmmhooks.prompting import answer
from tests.methods.looked import PROMPT, looked, models, picture  # noqa: F401 # fixtures
from tests.reference import looking_again as naive

LAYER = 3


def attention(height=30, width=47, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width)) * (generator.random((height, width)) < 0.4)


def edges_of(values, size, **settings):
    sums = densities(values, **settings)
    return tuple(knots(density, length) for density, length in zip(sums, size, strict=True))


# -- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(47, 30), (500, 500), (20, 61)])
@pytest.mark.parametrize("transform", ["identity", "sqrt", "square", "exp"])
def test_sampling_positions_are_those_of_a_walk_along_the_edges(size, transform):
    values = attention().astype(float) / (40 if transform == "exp" else 1)
    function = {"identity": lambda x: x, "sqrt": np.sqrt, "square": lambda x: x**2, "exp": np.exp}[transform]
    amount = function(values) + 1e-9
    across, down = positions([edges_of(values, size, transform=transform)])
    expected = (
        naive.warp_positions(amount.sum(axis=0).tolist(), size[0]),
        naive.warp_positions(amount.sum(axis=1).tolist(), size[1]),
    )
    np.testing.assert_allclose(across, expected[0], atol=1e-8)
    np.testing.assert_allclose(down, expected[1], atol=1e-8)


@pytest.mark.parametrize("transform", ["identity", "sqrt", "square", "exp"])
def test_warps_are_monotone_and_stay_on_the_picture(transform):
    values = attention(seed=1) / (40 if transform == "exp" else 1)
    for invert in (False, True):
        across, down = positions([edges_of(values, (90, 70), transform=transform, invert=invert)])
        for places, length in ((across, 47), (down, 30)):
            assert (np.diff(places) >= 0).all()
            assert 0 <= places.min() <= places.max() <= length


def test_an_even_map_is_a_plain_resize_and_scale_does_not_matter():
    across, down = positions([edges_of(np.ones((30, 47)), (94, 60))])
    np.testing.assert_allclose(across, np.arange(94) / 2, atol=1e-9)
    np.testing.assert_allclose(down, np.arange(60) / 2, atol=1e-9)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8))
    same = positions([edges_of(np.full((30, 47), 7.0), (47, 30))])
    assert warped(image, *same).tobytes() == image.tobytes()
    for transform in ("identity", "sqrt", "square"):
        ways = [positions([edges_of(k * attention(), (47, 30), transform=transform)]) for k in (1, 16)]
        # What is added to every pixel does not scale.
        np.testing.assert_allclose(ways[0][0], ways[1][0], atol=1e-6)


def test_a_map_without_mass_is_a_plain_resize():
    # What is added to every pixel is left: the same everywhere.
    for shape in ((30, 47), (1, 1)):
        across, _ = positions([edges_of(np.zeros(shape), shape[::-1])])
        np.testing.assert_allclose(across, np.arange(shape[1]), atol=1e-9)
    assert [len(density) for density in densities(np.zeros((2, 3)), "square", True)] == [3, 2]


def test_inverses_undo_their_functions():
    values = np.linspace(0.1, 3, 20)
    for function, inverse in TRANSFORMS.values():
        np.testing.assert_allclose(inverse(function(values)), values)
    direct, _ = densities(np.full((4, 6), 9.0), "sqrt", invert=True)
    np.testing.assert_allclose(direct, (4 * 3.0) ** 2, rtol=1e-6)


def test_places_go_there_and_back():
    edges = edges_of(attention() + 1, (470, 300))[0]
    places = np.linspace(0, 470, 91)
    np.testing.assert_allclose(forwards(backwards(places, edges), edges), places, atol=1e-8)
    assert forwards(np.array([0.0, 47.0]), edges).tolist() == [0, 470]


def test_the_widest_column_can_be_capped():
    density = densities(attention())[0]
    assert magnification(density) > 1.5
    limited = capped(density, 1.5)
    assert magnification(limited) == pytest.approx(1.5)
    assert limited.sum() == pytest.approx(density.sum())
    assert magnification(capped(density, 1.0)) == pytest.approx(1)
    assert capped(density, None) is density
    assert capped(density, 100.0) is density


def test_pixels_are_those_of_four_neighbours():
    generator = np.random.default_rng(5)
    image = generator.integers(0, 256, (12, 15, 3), dtype=np.uint8)
    across, down = np.sort(generator.random(20) * 15), np.sort(generator.random(9) * 12)
    across[-1], down[-1] = 15, 12
    found = np.asarray(warped(Image.fromarray(image), across, down)).astype(float)
    # Rounded to whole levels, in float32: half a level and a little.
    np.testing.assert_allclose(found, naive.bilinear(image, across, down), atol=0.501)


def test_chains_are_composed_and_the_first_picture_sampled():
    first, second = edges_of(attention(), (50, 40)), edges_of(attention(40, 50, seed=2), (60, 30))
    across, down = positions([first, second])
    for axis, (places, length) in enumerate(((across, 60), (down, 30))):
        one_by_one = [
            np.interp(np.interp(pixel, second[axis], range(len(second[axis]))), first[axis], range(len(first[axis])))
            for pixel in range(length)
        ]
        np.testing.assert_allclose(places, one_by_one, atol=1e-9)


def test_divergence_of_maps():
    p, q = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])
    expected = 0.75 * np.log(0.75 / 0.25) + 0.25 * np.log(0.25 / 0.25)
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence(q, 5 * q) == pytest.approx(0, abs=1e-7)


# -- on models --------------------------------------------------------------------------------------------------------


def test_the_picture_is_warped_by_the_mask(models, picture, monkeypatch):  # noqa: F811
    model, eager, processor = models
    rows = naive.attention_rows(eager, processor, picture, PROMPT, LAYER, 5)
    spec = f"attwarp(layer={LAYER}, max_new_tokens=5, geometry='official')"
    text, found, shown = looked(monkeypatch, model, processor, spec, picture)
    # Float32 forwards that sum in another order.
    torch.testing.assert_close(found.values, torch.tensor(naive.mean_within_image(rows)).double(), atol=1e-5, rtol=1e-4)
    cells, _ = found.grid()
    small = np.floor(np.array(naive.soft_mask(cells.tolist(), 10.0, 3)) * 255).astype(np.uint8)
    mask = np.asarray(Image.fromarray(small).resize(picture.size, Image.Resampling.LANCZOS)).astype(float)
    across = naive.warp_positions((mask.sum(axis=0) + 150e-9).tolist(), 260)
    down = naive.warp_positions((mask.sum(axis=1) + 260e-9).tolist(), 150)
    expected = warped(picture, np.array(across), np.array(down))
    difference = np.abs(np.asarray(shown[0], dtype=int) - np.asarray(expected, dtype=int))
    # A cell of the mask that falls on the other side of a level moves columns by a hundredth of a pixel.
    assert difference.max() <= 3
    assert text == answer(model, processor, shown, PROMPT, max_new_tokens=4)


def test_sizes_and_the_cap(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    _, _, shown = looked(monkeypatch, model, processor, "attwarp(preset='released')", picture)
    assert [image.size for image in shown] == [(500, 500)]
    _, _, shown = looked(monkeypatch, model, processor, "attwarp(max_magnification=1, show='both')", picture)
    assert shown[0].tobytes() == shown[1].tobytes(), "no column may become wider, so none can become narrower"
    plain = answer(model, processor, picture, PROMPT, max_new_tokens=4)
    for spec in ("attwarp(max_magnification=1)", "refine(map='vicrop-rel', operator='attwarp(max_magnification=1)')"):
        with lmmhooks.wrap(model, spec, processor=processor) as patch:
            assert patch.attached == []
            assert patch.answer(picture, PROMPT, max_new_tokens=4) == plain


def test_a_chain_is_warps_one_after_the_other(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    spec = f"attwarp(layer={LAYER}, chain=%d, epsilon=%g, max_new_tokens=3)"
    _, first, one = looked(monkeypatch, model, processor, spec % (1, 0), picture)
    _, _, again = looked(monkeypatch, model, processor, spec % (1, 0), one[0])
    text, _, both = looked(monkeypatch, model, processor, spec % (2, 0), picture)
    assert both[0].size == picture.size
    assert both[0].tobytes() != one[0].tobytes()
    _, second, _ = looked(monkeypatch, model, processor, spec % (1, 0), one[0])
    method = lmmhooks.method("attwarp")
    expected = warped(picture, *positions([method.edges(first), method.edges(second)]))
    assert both[0].tobytes() == expected.tobytes()
    assert text == answer(model, processor, both, PROMPT, max_new_tokens=4)
    # Sampled once, not twice: sharper than the warp of the warp.
    assert both[0].tobytes() != again[0].tobytes()
    _, _, ended = looked(monkeypatch, model, processor, spec % (5, 1e9), picture)
    assert ended[0].tobytes() == one[0].tobytes(), "the second map is like the first, if anything is"
    _, _, flat = looked(monkeypatch, model, processor, "attwarp(chain=3, min_spread=1e9)", picture)
    assert flat[0].tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "settings",
    [{"transform": "log"}, {"size": (0, 5)}, {"size": (5,)}, {"max_magnification": 0.5}, {"chain": 0}, {"epsilon": -1}],
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        AttWarp(**settings)


def test_settings_survive_being_written_down():
    method = AttWarp(size=(500, 400), chain=3)
    assert lmmhooks.methods.resolve(method.spec()) == method
