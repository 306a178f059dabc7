"""Visual prompts on regions: operators against loops over pixels, masks of maps, of the caller and of neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from transformers import (
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.refinement import operators
from lmmhooks.methods.refinement.fgvp import Fgvp, of_mask
from lmmhooks.methods.refinement.regions import best_regions, box_of, number_kept, top_share
from lmmhooks.methods.refinement.segmenting import segment, without_specks
from lmmhooks.prompting import answer
from tests.methods.looked import PROMPT, looked, models, picture  # noqa: F401 # fixtures

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (64, 80, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def ring():
    y, x = np.mgrid[:64, :80]
    distance = np.hypot(y - 30, x - 45)
    return (distance < 22) & (distance > 6)


def box():
    mask = np.zeros((64, 80), dtype=bool)
    mask[10:40, 0:25] = True
    return mask


MASKS = {"ring": ring(), "box": box()}
OPERATORS = ("blur", "gray", "reverse", "mask", "contour")


def prompted(mask, operator, **settings):
    return np.asarray(Fgvp(operator=operator, **settings).refined(IMAGE, of_mask(mask)))


# -- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_blur_keeps_the_region_sharp(mask):
    found = prompted(mask, "blur", blur_radius=20, encoder_size=80)
    blurred = np.asarray(IMAGE.filter(ImageFilter.GaussianBlur(20)))
    for y in range(64):
        for x in range(80):
            assert (found[y, x] == (PIXELS if mask[y, x] else blurred)[y, x]).all()
    # The radius is that of an encoder's picture of 336 pixels, scaled to 80.
    scaled = np.asarray(IMAGE.filter(ImageFilter.GaussianBlur(100 * 80 / 336)))
    assert (prompted(mask, "blur")[~mask] == scaled[~mask]).all()
    assert (prompted(mask, "blur", blur_radius=0) == PIXELS).all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gray_has_the_weights_that_are_asked_for(mask):
    released, right = prompted(mask, "gray"), prompted(mask, "gray", luminance="rgb")
    for y in range(0, 64, 3):
        for x in range(80):
            r, g, b = PIXELS[y, x].astype(float)
            if mask[y, x]:
                assert (released[y, x] == PIXELS[y, x]).all()
            else:
                # 15-bit weights of OpenCV: within a rounding of the exact ones.
                assert abs(released[y, x] - (0.114 * r + 0.587 * g + 0.299 * b)).max() < 0.51
                assert abs(right[y, x] - (0.299 * r + 0.587 * g + 0.114 * b)).max() < 0.51
                assert len(set(released[y, x])) == 1


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_tints_mix_a_colour_in(mask, alpha):
    inside, outside = prompted(mask, "mask", alpha=alpha), prompted(mask, "reverse", alpha=alpha)
    for y in range(0, 64, 3):
        for x in range(80):
            # Half to even, in float32 like OpenCV.
            parts = zip((0, 255, 0), PIXELS[y, x], strict=True)
            mixed = [round(float(np.float32(alpha * c) + np.float32(1 - alpha) * v)) for c, v in parts]
            assert inside[y, x].tolist() == (mixed if mask[y, x] else PIXELS[y, x].tolist())
            assert outside[y, x].tolist() == (PIXELS[y, x].tolist() if mask[y, x] else mixed)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_contours_are_drawn_on_both_sides_of_the_edge(mask):
    thin, thick = prompted(mask, "contour", thickness=1), prompted(mask, "contour")
    edge = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        edge[y, x] = any(not (0 <= j < 64 and 0 <= i < 80 and mask[j, i]) for j, i in around)
    assert ((thin == (255, 0, 0)).all(axis=2) == edge).all()
    assert (thin[~edge] == PIXELS[~edge]).all()
    assert ((thick == (255, 0, 0)).all(axis=2) == ndimage.binary_dilation(edge)).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_size_and_type_stay_and_the_picture_is_not_changed(operator):
    before = IMAGE.tobytes()
    for mask in MASKS.values():
        found = prompted(mask, operator)
        assert found.shape == PIXELS.shape
        assert found.dtype == np.uint8
    assert IMAGE.tobytes() == before


@pytest.mark.parametrize("operator", ["blur", "gray", "reverse"])
def test_a_region_that_is_everything_changes_nothing(operator):
    assert (prompted(np.ones((64, 80), dtype=bool), operator) == PIXELS).all()


def test_black_and_blending_masks():
    assert (np.asarray(operators.black(IMAGE, ring())) == PIXELS * ring()[..., None]).all()
    half = Image.new("L", IMAGE.size, 128)
    mixed = np.asarray(operators.seen_through(IMAGE, Image.new("RGB", IMAGE.size), half)).astype(float)
    assert np.abs(mixed - PIXELS * (128 / 255)).max() <= 1


# -- masks ------------------------------------------------------------------------------------------------------------


def test_the_region_of_a_map_is_what_carve_keeps():
    plane = torch.from_numpy(ndimage.gaussian_filter(RNG.random((64, 80)), 4))
    found = Fgvp(share=0.1, num_regions=2).mask(of_mask_values(plane))
    top = top_share(plane, 0.1)
    labels, count = ndimage.label(top)
    sums = sorted(((float(plane[torch.from_numpy(labels == n)].sum()), n) for n in range(1, count + 1)), reverse=True)
    expected = np.isin(labels, [n for _, n in sums[: max(2, int(0.1 * count))]])
    assert (found == expected).all()
    assert number_kept(top, 2, 0.1) == max(2, int(0.1 * count))
    assert (best_regions(top, plane, 100) == top).all()


def of_mask_values(plane):
    found = of_mask(np.ones(plane.shape, dtype=bool))
    return type(found)(plane.flatten(), found.geometry)


def test_a_mask_is_a_map_of_its_own():
    for mask in MASKS.values():
        assert (Fgvp().mask(of_mask(mask)) == mask).all()
        assert box_of(mask) == (
            np.flatnonzero(mask.any(axis=0))[0], np.flatnonzero(mask.any(axis=1))[0],
            np.flatnonzero(mask.any(axis=0))[-1] + 1, np.flatnonzero(mask.any(axis=1))[-1] + 1,
        )  # fmt: skip
    assert box_of(np.zeros((3, 3), dtype=bool)) is None


# -- on models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vicrop-rel(layer=3)", "carve(read_layers=(3, 4))"])
def test_the_mask_is_of_the_map_that_is_named(models, picture, monkeypatch, name):  # noqa: F811
    model, _, processor = models
    _, source, _ = looked(monkeypatch, model, processor, name, picture)
    text, found, shown = looked(monkeypatch, model, processor, Fgvp(map=name), picture)
    torch.testing.assert_close(found.values, source.values)
    plane = found.plane()
    top = top_share(plane, 0.2)
    mask = best_regions(top, plane, number_kept(top, 3, 0.2))
    blurred = picture.filter(ImageFilter.GaussianBlur(100 * 260 / 336))
    expected = np.where(mask[..., None], np.asarray(picture), np.asarray(blurred))
    assert (np.asarray(shown[0]) == expected).all()
    assert text == answer(model, processor, shown, PROMPT, max_new_tokens=4)


def test_the_region_of_the_caller_comes_first(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    _, _, shown = looked(monkeypatch, model, processor, "fgvp(operator='gray')", picture, region=(20, 30, 90, 100))
    gray = np.asarray(operators.grayed(picture)).copy()
    gray[30:100, 20:90] = np.asarray(picture)[30:100, 20:90]
    assert (np.asarray(shown[0]) == gray).all()
    with lmmhooks.wrap(model, "fgvp", processor=processor) as patch, pytest.raises(PromptError, match="region"):
        patch.answer(picture, PROMPT, region=(20, 30, 10, 300))


def test_a_soft_mask_fades(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    _, _, hard = looked(monkeypatch, model, processor, "fgvp", picture)
    _, _, soft = looked(monkeypatch, model, processor, "fgvp(soft=True)", picture)
    assert soft[0].tobytes() not in (hard[0].tobytes(), picture.tobytes())


def test_both_pictures_can_be_shown(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    _, _, shown = looked(monkeypatch, model, processor, "fgvp(show='both', operator='contour')", picture)
    assert shown[0].tobytes() == picture.tobytes()
    assert len(shown) == 2


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """Folder of a tiny SAM with random weights."""
    folder = tmp_path_factory.mktemp("sam")
    vision = SamVisionConfig(
        hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8,
        window_size=4, global_attn_indexes=[0], mlp_dim=16, num_pos_feats=8,
    )  # fmt: skip
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    masks = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    torch.manual_seed(0)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)
    model = SamModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    prepare = SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    SamProcessor(prepare).save_pretrained(folder)
    return str(folder)


def test_sam_cuts_out_what_is_in_the_box(models, picture, monkeypatch, sam):  # noqa: F811
    model, _, processor = models
    spec = f"fgvp(operator='mask', alpha=1, sam={sam!r}, min_area=0)"
    _, _, shown = looked(monkeypatch, model, processor, spec, picture, region=(20, 30, 90, 100))
    mask = segment(picture, (20, 30, 90, 100), sam)
    assert mask.shape == (150, 260)
    assert mask.any()
    assert not mask.all()
    assert ((np.asarray(shown[0]) == (0, 255, 0)).all(axis=2) >= mask).all()
    assert (np.asarray(shown[0])[~mask] == np.asarray(picture)[~mask]).all()
    assert (segment(picture, (200, 10, 250, 60), sam) != mask).any(), "another box, another mask"


def test_sam_that_cannot_be_loaded_is_refused_when_wrapping(models, tmp_path):  # noqa: F811
    model, _, processor = models
    with pytest.raises(MethodError, match="give the folder or hub id of a SAM model"):
        lmmhooks.wrap(model, f"fgvp(sam={str(tmp_path)!r})", processor=processor)


def test_specks_are_removed():
    mask = np.zeros((1024, 1024), dtype=bool)
    mask[100:200, 100:200] = True
    mask[120:130, 120:130] = False  # 100 pixels
    mask[150:180, 150:180] = False  # 900
    mask[500:510, 500:510] = True  # 100
    mask[600:630, 600:630] = True  # 900
    found = without_specks(mask, 400)
    expected = mask.copy()
    expected[120:130, 120:130] = True
    expected[500:510, 500:510] = False
    assert (found == expected).all()
    assert (without_specks(mask, 0) == mask).all()
    # The largest stays whatever its size, and areas are those of a picture of 1024 pixels.
    assert without_specks(mask, 1e6)[100:200, 100:200].all()
    small = mask[::4, ::4]
    assert (without_specks(small, 400) == expected[::4, ::4]).all()
    assert not without_specks(np.zeros((9, 9), dtype=bool), 0).any()


@pytest.mark.parametrize(
    "settings",
    [{"operator": "melt"}, {"soft": True, "operator": "mask"}, {"share": 0}, {"num_regions": 0}, {"blur_radius": -1},
     {"encoder_size": 0}, {"alpha": 2}, {"colour": (0, 0)}, {"line_colour": (0, 0, 300)}, {"thickness": 0},
     {"luminance": "bgr"}, {"map": "fastv"}, {"map": "zoomeye"}, {"map": "nothing"}],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(
        MethodError, match=next(iter(settings)) if settings.get("map") != "nothing" else "unknown method"
    ):
        Fgvp(**settings)
