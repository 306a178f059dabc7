"""Attention prompting: map and mask against plain Python on full forwards, blends to the grey level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.refinement.api import HINT, weakened
from lmmhooks.methods.refinement.operators import fade
from lmmhooks.methods.refinement.softmask import placed, smoothed, soft_mask, stretched, within_image
from lmmhooks.prompting import answer
from tests.methods.looked import PROMPT, looked, models, picture  # noqa: F401 # fixtures
from tests.reference import looking_again as naive

LAYER = 3
GENERATOR = torch.Generator().manual_seed(11)


def grid(rows=24, columns=24):
    return torch.rand(rows, columns, generator=GENERATOR) ** 4 / 100


# -- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("contrast", "kernel"), [(5.0, 3), (10.0, 3), (5.0, 1), (2.0, 5)])
@pytest.mark.parametrize("shape", [(24, 24), (8, 13), (2, 3)])
def test_the_mask_is_that_of_loops(shape, contrast, kernel):
    values = grid(*shape)
    expected = torch.tensor(naive.soft_mask(values.tolist(), contrast, kernel))
    # Float32 against float64.
    torch.testing.assert_close(soft_mask(values, contrast, kernel), expected, atol=1e-5, rtol=0)


def test_neither_scale_nor_offset_matters():
    values = grid()
    mask = soft_mask(values, 5.0, 3)
    torch.testing.assert_close(soft_mask(7 * values - 0.2, 5.0, 3), mask, atol=1e-5, rtol=0)
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1


def test_a_map_that_is_the_same_everywhere_hides_nothing():
    assert soft_mask(torch.full((4, 5), 0.3), 5.0, 3).eq(1).all()
    assert stretched(torch.zeros(3)).eq(1).all()
    torch.testing.assert_close(smoothed(torch.full((4, 5), 0.3), 3), torch.full((4, 5), 0.3))


def test_the_map_is_that_of_the_softmax_over_visual_scores():
    scores = torch.randn(4, 3, 20, generator=GENERATOR)
    rows = scores.softmax(dim=-1)[..., 5:17]
    expected = scores[..., 5:17].softmax(dim=-1).mean(dim=1).mean(dim=0)
    torch.testing.assert_close(within_image(rows), expected.double(), atol=1e-7, rtol=0)
    np.testing.assert_allclose(within_image(rows), naive.mean_within_image(rows), atol=1e-10)
    assert within_image(torch.zeros(1, 2, 3)).eq(0).all()


def test_masks_are_truncated_to_8_bits_and_enlarged():
    mask = torch.tensor([[0.0, 0.999], [0.5, 1.0]])
    assert np.asarray(placed(mask, (0, 0, 2, 2), (2, 2))).tolist() == [[0, 254], [127, 255]]
    small = Image.fromarray(np.array([[0, 254], [127, 255]], dtype=np.uint8))
    for name, resampling in (("lanczos", Image.Resampling.LANCZOS), ("bicubic", Image.Resampling.BICUBIC)):
        found = placed(mask, (0, 0, 31, 17), (31, 17), name)
        assert found.tobytes() == small.resize((31, 17), resampling).tobytes()


def test_a_mask_of_a_part_lies_there():
    inside = np.asarray(placed(torch.ones(2, 2), (3.0, 0.0, 7.0, 4.0), (10, 4)))
    assert inside[:, 3:7].min() == 255
    assert inside[:, :3].max() == inside[:, 7:].max() == 0
    # The model saw padding at the left and right: only the middle of the mask is on the picture.
    beyond = np.asarray(placed(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), (-10.0, 0.0, 30.0, 10.0), (20, 10)))
    assert beyond.shape == (10, 20)
    assert beyond[:, 5:15].min() > 200


def test_blends_are_truncated():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    mask = Image.fromarray(generator.integers(0, 256, (6, 5), dtype=np.uint8))
    found = np.asarray(fade(image, mask, 200))
    for y in range(6):
        for x in range(5):
            m = np.float32(np.asarray(mask)[y, x]) / np.float32(255)
            for channel in range(3):
                level = np.float32(np.asarray(image)[y, x, channel]) * m + np.float64((1 - m) * np.float64(200))
                assert found[y, x, channel] == int(level)
    white, black = Image.new("L", (5, 6), 255), Image.new("L", (5, 6), 0)
    assert fade(image, white, 200).tobytes() == image.tobytes()
    assert set(fade(image, black, 200).tobytes()) == {200}


def test_a_weak_mask_hides_less():
    mask = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    assert weakened(mask, 1.0) is mask
    assert list(weakened(mask, 0.5).tobytes()) == [128, 178, 255]  # 127.5 and 177.5, half to even
    assert list(weakened(mask, 0.0).tobytes()) == [255, 255, 255]


# -- on models --------------------------------------------------------------------------------------------------------


def test_the_map_is_that_of_full_forwards(models, picture, monkeypatch):  # noqa: F811
    model, eager, processor = models
    rows = naive.attention_rows(eager, processor, picture, PROMPT, LAYER, 6)
    text, found, shown = looked(monkeypatch, model, processor, f"api(layer={LAYER}, max_new_tokens=6)", picture)
    expected = torch.tensor(naive.mean_within_image(rows))
    # Float32 forwards that sum in another order.
    torch.testing.assert_close(found.values, expected.double(), atol=1e-5, rtol=1e-4)
    cells, box = found.grid()
    mask = placed(torch.tensor(naive.soft_mask(cells.tolist(), 5.0, 3)), box, picture.size)
    faded = fade(picture, mask, 200)
    # A mask is truncated; values at the edge between two levels may fall on either side.
    difference = np.abs(np.asarray(shown[0], dtype=int) - np.asarray(faded, dtype=int))
    assert len(shown) == 1
    assert difference.max() <= 2
    assert text == answer(model, processor, shown, PROMPT, max_new_tokens=4)


def test_official_geometry_covers_the_whole_picture(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    _, found, shown = looked(monkeypatch, model, processor, f"api(layer={LAYER}, geometry='official')", picture)
    cells, box = found.grid()
    assert box == (0, 0, *picture.size)
    small = Image.fromarray((soft_mask(cells, 5.0, 3) * 255).byte().numpy())
    mask = small.resize(picture.size, Image.Resampling.LANCZOS)
    assert shown[0].tobytes() == fade(picture, mask, 200).tobytes()


def test_hint_strength_and_background(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    text, _, shown = looked(monkeypatch, model, processor, "api(preset='hint', background=0, strength=0.5)", picture)
    assert text == answer(model, processor, shown, HINT.replace("{question}", PROMPT), max_new_tokens=4)
    assert np.asarray(shown[0]).sum() < np.asarray(picture).sum()
    plain = answer(model, processor, picture, PROMPT, max_new_tokens=4)
    with lmmhooks.wrap(model, "api(strength=0)", processor=processor) as patch:
        assert patch.attached == []
        assert patch.answer(picture, PROMPT, max_new_tokens=4) == plain


def test_filters_of_steps_and_sinks(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    _, plain, _ = looked(monkeypatch, model, processor, f"api(layer={LAYER})", picture)
    for spec in (f"api(layer={LAYER}, token_filter='content')", f"api(layer={LAYER}, sink_filter='drop')"):
        _, found, _ = looked(monkeypatch, model, processor, spec, picture)
        assert found.values.shape == plain.values.shape
        torch.testing.assert_close(found.values.sum(), plain.values.sum(), atol=1e-5, rtol=0)


def test_bad_pictures_and_settings(models, monkeypatch):  # noqa: F811
    model, _, processor = models
    noise = np.random.default_rng(1).integers(0, 256, (4000, 900), dtype=np.uint8)
    for mode in ("L", "RGBA", "CMYK"):
        image = Image.fromarray(noise).convert(mode)
        _, _, shown = looked(monkeypatch, model, processor, "api", image, max_new_tokens=1)
        assert shown[0].size == (900, 4000)
    plain = answer(model, processor, None, "Hello?", max_new_tokens=2)
    with lmmhooks.wrap(model, "api", processor=processor) as patch:
        assert patch.answer(None, "Hello?", max_new_tokens=2) == plain
        with pytest.raises(PromptError, match="one image"):
            patch.answer([Image.new("RGB", (9, 9))] * 2, PROMPT)
        [method] = patch.methods
        assert method.layer == 5
        assert lmmhooks.methods.resolve(method.spec()) == method


@pytest.mark.parametrize(
    "settings",
    [{"layer": -1}, {"kernel": 2}, {"contrast": 0}, {"resampling": "nearest"}, {"background": 256}, {"strength": 2},
     {"template": "?"}, {"max_new_tokens": 0}, {"token_filter": "some"}, {"sink_filter": "some"}, {"show": "none"}],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        lmmhooks.method("api", **settings)
