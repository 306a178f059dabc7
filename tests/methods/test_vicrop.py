"""ViCrop: maps against full forwards with eager attention and full graphs, the crop against a search by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.refinement.base import NEUTRAL
from lmmhooks.methods.refinement.operators import cropped
from lmmhooks.methods.refinement.vicrop import best_crop, tile_boxes
from lmmhooks.methods.refinement.vicrop_grad import weighted
from lmmhooks.methods.refinement.vicrop_pure_grad import high_pass, per_cell
from lmmhooks.methods.refinement.vicrop_rel import relative
from lmmhooks.prompting import answer
from tests.methods.looked import PROMPT, looked, models, picture  # noqa: F401 # fixtures
from tests.reference import looking_again as naive

LAYER = 3


def close(found, expected):
    # Float32 forwards that sum in another order; attention over an image of 64 tokens is about 1e-2.
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-7)


# -- the crop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (500, 500), (900, 4000), (3000, 400), (350, 300), (200, 150)])
@pytest.mark.parametrize("cells", [(24, 24), (7, 10), (16, 3)])
@pytest.mark.parametrize("base", [336, 224])
def test_the_crop_is_that_of_a_search_by_hand(size, cells, base):
    values = torch.rand(*cells, generator=torch.Generator().manual_seed(sum(size) + base), dtype=torch.float64)
    assert best_crop(values, size, base) == naive.crop_box(values.tolist(), size, base)


def test_of_equal_windows_the_first_column_after_column_is_taken():
    box = best_crop(torch.ones(8, 8), (800, 800), 200)
    assert box == naive.crop_box(torch.ones(8, 8).tolist(), (800, 800), 200) == (0, 0, 200, 200)
    # Three neighbours make one size as sharp as another: the first of them stays.
    assert best_crop(5 * torch.ones(8, 8), (800, 800), 200) == box


def test_scale_does_not_matter_and_the_box_stays_inside():
    for seed in range(20):
        values = torch.rand(12, 9, generator=torch.Generator().manual_seed(seed))
        box = best_crop(values, (700, 500), 224)
        # Powers of two leave every digit as it is.
        assert best_crop(values * 8, (700, 500), 224) == box
        assert 0 <= box[0] < box[2] <= 700
        assert 0 <= box[1] < box[3] <= 500


def test_an_image_smaller_than_the_base_is_shown_whole():
    assert best_crop(torch.rand(24, 24), (300, 200), 336) == (0, 0, 300, 200)


def test_a_window_smaller_than_a_cell_is_a_cell():
    values = torch.zeros(4, 4)
    values[2, 1] = 1.0
    box = best_crop(values, (4000, 4000), 100)
    assert box[2] - box[0] <= 200
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert 1000 <= middle[0] <= 2000
    assert 2000 <= middle[1] <= 3000


def test_a_map_of_a_part_of_the_image_is_searched_there():
    values = torch.zeros(8, 8)
    values[3:5, 3:5] = 1.0
    left, top, right, bottom = best_crop(values, (1000, 400), 100, box=(300.0, 0.0, 700.0, 400.0))
    # The four cells that matter reach from 450 to 550 and from 150 to 250.
    assert left <= 450 < 550 <= right
    assert top <= 150 < 250 <= bottom


@pytest.mark.parametrize(
    ("size", "columns", "rows", "tile"),
    [((3000, 2000), 3, 2, (1000, 1000)), ((1024, 1024), 1, 1, (1024, 1024)), ((900, 4000), 1, 4, (900, 1000)),
     ((2500, 1030), 4, 2, (625, 515)), ((1001, 1100), 1, 2, (1001, 550))],
)  # fmt: skip
def test_tiles_cover_the_image_row_by_row(size, columns, rows, tile):
    boxes, found = tile_boxes(size, 1024)
    assert found == columns
    assert len(boxes) == columns * rows
    expected = [
        (x * tile[0], y * tile[1], (x + 1) * tile[0], (y + 1) * tile[1]) for y in range(rows) for x in range(columns)
    ]
    assert boxes == expected
    assert boxes[-1][2] >= size[0]
    assert boxes[-1][3] >= size[1]


def test_crops_are_rounded_and_never_empty():
    image = Image.new("RGB", (50, 40))
    assert cropped(image, (1.5, 2.5, 10.5, 11.6)).size == (8, 10)
    assert cropped(image, (50.0, 40.0, 50.0, 40.0)).size == (1, 1)


# -- maps -------------------------------------------------------------------------------------------------------------


def test_relative_attention_is_that_of_two_full_forwards(models, picture, monkeypatch):  # noqa: F811
    model, eager, processor = models
    prompt = f"{PROMPT} Answer the question using a single word or phrase."
    neutral = f"{NEUTRAL} Answer the question using a single word or phrase."
    question, general = (naive.attention_rows(eager, processor, picture, p, LAYER, 1)[0] for p in (prompt, neutral))
    text, found, shown = looked(
        monkeypatch, model, processor, f"vicrop-rel(layer={LAYER}, base_size=56)", picture, prompt
    )
    close(found.values, question.mean(dim=0) / general.mean(dim=0))
    grid, box = found.grid()
    crop = picture.crop(best_crop(grid, picture.size, 56, box=box))
    assert [image.tobytes() for image in shown] == [picture.tobytes(), crop.tobytes()]
    assert text == answer(model, processor, [picture, crop], prompt, max_new_tokens=4)


def test_official_geometry_stretches_the_map(models, picture, monkeypatch):  # noqa: F811
    model, eager, processor = models
    question, general = (naive.attention_rows(eager, processor, picture, p, LAYER, 1)[0] for p in (PROMPT, NEUTRAL))
    spec = f"vicrop-rel(layer={LAYER}, base_size=56, geometry='official')"
    _, found, shown = looked(monkeypatch, model, processor, spec, picture)
    rows, columns = found.grid()[0].shape
    values = (question.double().mean(dim=0) / general.double().mean(dim=0)).reshape(rows, columns)
    expected = naive.crop_box(values.tolist(), picture.size, 56)
    assert shown[1].tobytes() == picture.crop(expected).tobytes()


def test_the_gradient_is_that_of_the_whole_graph(models, picture, monkeypatch):  # noqa: F811
    model, eager, processor = models
    attention, gradient = naive.attention_gradient(eager, processor, picture, PROMPT, LAYER)
    _, found, shown = looked(monkeypatch, model, processor, f"vicrop-grad(layer={LAYER}, base_size=56)", picture)
    expected = (attention * gradient.clamp(min=0)).mean(dim=0)
    # Derivatives are small and differences of large numbers.
    torch.testing.assert_close(found.values, expected.double(), rtol=1e-3, atol=1e-5 * float(expected.max()))
    assert len(shown) == 2


def test_pixel_gradients_are_those_of_the_whole_graph(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    _, found, shown = looked(monkeypatch, model, processor, "vicrop-pure-grad(base_size=56)", picture)
    parts = [naive.pixel_gradient(model, processor, picture, prompt) for prompt in (PROMPT, NEUTRAL)]
    grid, box = found.grid()
    if parts[0].ndim == 4:
        norms = [part[0].norm(dim=0) for part in parts]
        size = 112
        view = picture.crop(tuple(round(side) for side in box))
        fine = high_pass(view, (size, size))
        kept = norms[0] / norms[1] * torch.from_numpy(fine > np.median(fine))
        cells = [[kept[14 * y : 14 * y + 14, 14 * x : 14 * x + 14].mean() for x in range(8)] for y in range(8)]
        torch.testing.assert_close(grid, torch.tensor(cells).double(), rtol=1e-3, atol=1e-4)
    else:
        # Rows of patches hold both frames of a still image; the derivative by a pixel of it is the sum over both.
        merged = [
            part.reshape(*[side // 2 for side in (2 * len(grid), 2 * grid.shape[1])], 2, 2, 3, 2, 49) for part in parts
        ]
        norms = [part.sum(dim=5).norm(dim=4) for part in merged]
        ratio = (norms[0] / norms[1]).reshape(*grid.shape, 2, 2, 7, 7).permute(0, 2, 4, 1, 3, 5)
        ratio = ratio.reshape(14 * len(grid), 14 * grid.shape[1])
        view = picture.crop(tuple(round(side) for side in box))
        fine = high_pass(view, (ratio.shape[1], ratio.shape[0]))
        kept = ratio * torch.from_numpy(fine > np.median(fine))
        torch.testing.assert_close(grid, per_cell(kept, tuple(grid.shape)).double(), rtol=1e-3, atol=1e-4)
    assert len(shown) == 2


@pytest.mark.parametrize("geometry", ["official", "true"])
def test_large_images_are_looked_at_tile_by_tile(models, picture, monkeypatch, geometry):  # noqa: F811
    model, eager, processor = models
    spec = f"vicrop-rel(layer={LAYER}, base_size=40, preset='high', tile_size=80, geometry={geometry!r})"
    _, found, shown = looked(monkeypatch, model, processor, spec, picture)
    boxes, columns = tile_boxes(picture.size, 80)
    assert (len(boxes), columns) == (6, 3)
    grid, box = found.grid()
    tile = len(grid) // 2, grid.shape[1] // 3
    assert box == ((0, 0, 260, 150) if geometry == "official" else (0, 0, 261, 150))
    maps = []
    for part in boxes:
        rows = [naive.attention_rows(eager, processor, picture.crop(part), p, LAYER, 1)[0] for p in (PROMPT, NEUTRAL)]
        maps.append(relative(*rows).reshape(-1))
    for place in range(6):
        y, x = divmod(place, 3)
        block = grid[y * tile[0] : (y + 1) * tile[0], x * tile[1] : (x + 1) * tile[1]]
        if geometry == "official" or "qwen" in type(model).__name__.lower():
            close(block.flatten(), maps[place])
        else:
            # The model sees the middle 75 of 87 columns: cells at the sides of the tile hold part of a cell, or less.
            assert float(block.sum()) < float(maps[place].sum())
            assert float(block[:, 0].sum()) < float(maps[place].reshape(8, 8)[:, 0].sum())
    assert len(shown) == 2


# -- pure functions ---------------------------------------------------------------------------------------------------


def test_maps_of_the_same_attention_are_even():
    rows = torch.rand(4, 30)
    assert relative(rows, rows).eq(1).all()
    assert weighted(rows, -rows).eq(0).all()
    torch.testing.assert_close(weighted(rows, rows), (rows.double() ** 2).mean(dim=0))


def test_the_high_pass_is_that_of_loops():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    pixels = np.asarray(image, dtype=np.float64) / 255
    side = np.exp(-0.5 * (np.array([-1.0, 0.0, 1.0]) / 0.8) ** 2)
    side /= side.sum()
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    fine = np.zeros((9, 11))
    for y in range(9):
        for x in range(11):
            blurred = sum(side[j] * side[i] * padded[y + j, x + i] for j in range(3) for i in range(3))
            fine[y, x] = np.sqrt(((pixels[y, x] - blurred) ** 2).sum())
    wide = np.pad(fine, 3, mode="symmetric")
    expected = [[np.median(wide[y : y + 7, x : x + 7]) for x in range(11)] for y in range(9)]
    # Float32 against float64.
    np.testing.assert_allclose(high_pass(image, (11, 9)), expected, atol=1e-6)


def test_cells_are_means_of_blocks():
    pixels = torch.arange(30.0).reshape(5, 6)
    assert per_cell(pixels, (2, 3)).tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]


# -- settings and bad input -------------------------------------------------------------------------------------------


def test_what_depends_on_the_model_is_filled_in(models):  # noqa: F811
    model, _, processor = models
    for name in ("vicrop-rel", "vicrop-grad", "vicrop-pure-grad"):
        with lmmhooks.wrap(model, name, processor=processor) as patch:
            [method] = patch.methods
            assert method.base_size == (112 if "Llava" in type(model).__name__ else 224)
            assert getattr(method, "layer", 4) == 4
            assert lmmhooks.methods.resolve(method.spec()) == method
    with pytest.raises(MethodError, match="layer=8 is not allowed"):
        lmmhooks.wrap(model, "vicrop-rel(layer=8)", processor=processor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"base_size": 0}, "base_size"), ({"ratios": ()}, "ratios"), ({"resolution": "low"}, "resolution"),
     ({"tile_size": 0}, "tile_size"), ({"layer": -1}, "layer"), ({"geometry": "no"}, "geometry")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(MethodError, match=message):
        lmmhooks.method("vicrop-rel", **settings)


@pytest.mark.parametrize("name", ["vicrop-rel", "vicrop-grad", "vicrop-pure-grad"])
def test_odd_pictures_and_no_picture(models, monkeypatch, name):  # noqa: F811
    model, _, processor = models
    noise = np.random.default_rng(1).integers(0, 256, (4000, 900), dtype=np.uint8)
    _, _, shown = looked(monkeypatch, model, processor, name, Image.fromarray(noise), max_new_tokens=1)
    assert len(shown) == 2
    plain = answer(model, processor, None, "Hello?", max_new_tokens=2)
    with lmmhooks.wrap(model, name, processor=processor) as patch:
        assert patch.answer(None, "Hello?", max_new_tokens=2) == plain
        with pytest.raises(PromptError, match="one image"):
            patch.answer([Image.new("RGB", (9, 9))] * 2, PROMPT)


def test_a_flat_map_leaves_the_picture_as_it_is(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    text, _, shown = looked(monkeypatch, model, processor, "vicrop-rel(min_spread=1e9)", picture)
    assert [image.tobytes() for image in shown] == [picture.tobytes()]
    assert text == answer(model, processor, picture, PROMPT, max_new_tokens=4)
