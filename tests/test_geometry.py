"""
Cell geometry against what image processors really do: a bright square is painted into an image, and the token whose
patches turn bright must have a rectangle over the painted place. Nothing of lmmhooks takes part in finding that token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lmmhooks.errors import PromptError
from lmmhooks.family import Family, resolve
from lmmhooks.geometry import CellGrid, Geometry, geometry_of
from lmmhooks.layout import VisualSpan, build_layout
from lmmhooks.placing import shown
from lmmhooks.vision import ImageTokens, VisionInputs
from tests.zoo import FAMILIES, VIDEO_FAMILIES, build, encode

_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 16,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _config(name: str) -> Any:
    """The published shapes of image, patch and tiles; everything that geometry does not depend on is tiny."""
    clip = CLIPVisionConfig(image_size=336, patch_size=14, **_TOWER)
    qwen = {"depth": 1, "num_heads": 2, "patch_size": 14, "hidden_size": 16}
    text = _TEXT | {"model_type": "llama"}
    mrope = {"text_config": _TEXT | {"rope_parameters": _MROPE}, "image_token_id": 3, "video_token_id": 4}
    if name == "llava":
        return LlavaConfig(vision_config=clip, text_config=text, image_token_index=3)
    if name == "llava_next":
        return LlavaNextConfig(
            vision_config=clip, text_config=text, image_token_index=3, image_grid_pinpoints=_NEXT_PINPOINTS
        )
    if name == "llava_onevision":
        tower = SiglipVisionConfig(image_size=384, patch_size=14, vision_use_head=False, **_TOWER)
        pinpoints = LlavaOnevisionImageProcessorPil.image_grid_pinpoints
        return LlavaOnevisionConfig(
            vision_config=tower,
            text_config=_TEXT | {"model_type": "qwen2"},
            image_token_index=3,
            video_token_index=4,
            image_grid_pinpoints=pinpoints,
        )
    if name == "internvl":
        tower = InternVLVisionConfig(image_size=448, patch_size=14, **_TOWER)
        return InternVLConfig(vision_config=tower, text_config=_TEXT | {"model_type": "qwen2"}, image_token_id=3)
    if name == "qwen2_vl":
        return Qwen2VLConfig(vision_config=qwen | {"embed_dim": 16}, **mrope)
    if name == "qwen2_5_vl":
        return Qwen2_5_VLConfig(
            vision_config=qwen | {"out_hidden_size": 16, "intermediate_size": 16, "fullatt_block_indexes": [0]}, **mrope
        )
    assert name == "qwen3_vl"
    over = {"patch_size": 16, "out_hidden_size": 16, "intermediate_size": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(vision_config=qwen | over, **mrope)


@cache
def published(name: str) -> Family:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(_config(name))
    return resolve(model)


def _qwen(patch: int) -> Any:
    return Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": 56 * 56, "longest_edge": 256 * 28 * 28})


_CLIP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}


@dataclass(frozen=True)
class Case:
    """A family with an image processor it is used with, and how the tokens of an image fall into groups."""

    name: str
    prepare: Callable[[], Any]
    overview: tuple[str, str] | None = None  # kinds of the first and of the second group of tokens
    images: int = 1

    def process(self, image: Image.Image) -> dict[str, Any]:
        images = [[image] * self.images] if self.images > 1 else image
        return dict(self.prepare()(images, return_tensors="pt"))


CASES = {
    "llava": Case("llava", lambda: CLIPImageProcessorPil(**_CLIP)),
    "llava, padded to a square": Case("llava", lambda: LlavaImageProcessorPil(do_pad=True, **_CLIP)),
    "llava, stretched": Case(
        "llava", lambda: CLIPImageProcessorPil(size={"height": 336, "width": 336}, do_center_crop=False)
    ),
    "llava, not resized": Case("llava", lambda: CLIPImageProcessorPil(**_CLIP, do_resize=False)),
    "llava_next": Case(
        "llava_next",
        lambda: LlavaNextImageProcessorPil(**_CLIP, image_grid_pinpoints=_NEXT_PINPOINTS),
        ("base", "tiles"),
    ),
    "llava_onevision": Case("llava_onevision", LlavaOnevisionImageProcessorPil, ("base", "tiles")),
    "llava_onevision, two images": Case("llava_onevision", LlavaOnevisionImageProcessorPil, images=2),
    "qwen2_vl": Case("qwen2_vl", lambda: _qwen(14)),
    "qwen2_5_vl": Case("qwen2_5_vl", lambda: _qwen(14)),
    "qwen3_vl": Case("qwen3_vl", lambda: _qwen(16)),
    "internvl": Case(
        "internvl",
        lambda: GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=6),
        ("tiles", "thumbnail"),
    ),
}
#: Shares of width and height: along the sides, which may be cut off, and around the middle, which never is.
_SIDES = ((0.02, 0.03), (0.98, 0.97), (0.23, 0.86), (0.71, 0.17), (0.12, 0.52), (0.6, 0.96))
PLACES = (*_SIDES, (0.51, 0.48), (0.44, 0.61), (0.57, 0.37))
SIZES = ((640, 480), (300, 500), (37, 23), (901, 210))


def brightness(case: Case, out: dict[str, Any]) -> Tensor:
    """Mean of the pixels that each visual token of the (first) image is made of; NaN for newline tokens."""
    pixels = out["pixel_values"]
    model = published(case.name).model.model
    if "image_grid_thw" in out:
        # Four consecutive rows are the patches of one merged token.
        return pixels.mean(dim=1).reshape(-1, 4).mean(dim=1)
    tower = model.config.vision_config
    if case.name == "internvl":
        # Two by two patches of 14 pixels are shuffled into one token.
        return torch.nn.functional.avg_pool2d(pixels.mean(dim=1), 28).flatten()
    crops = pixels if case.name == "llava" else pixels[0]
    patches = torch.nn.functional.avg_pool2d(crops.mean(dim=1), tower.patch_size).flatten(1)[..., None]
    if case.name == "llava":
        return patches.flatten()
    extra = {"vision_feature_select_strategy": "full"} if case.name == "llava_next" else {}
    newline = torch.full((1,), torch.nan)
    packed, _ = model.pack_image_features([patches], out["image_sizes"][:1], image_newline=newline, **extra)
    return packed[0].flatten()


def span_of(case: Case, out: dict[str, Any], num: int) -> VisualSpan:
    kwargs = {key: value for key, value in out.items() if key != "num_patches"}
    call = VisionInputs("image", kwargs, SimpleNamespace(pooler_output=[torch.zeros(num, 1)]))
    tokens = published(case.name).image_tokens(call, 0, num)
    return VisualSpan(0, 0, 0, "image", torch.arange(num), tokens)


def groups_of(case: Case, num: int) -> dict[str, slice]:
    """Tokens of the views of one image, by the lengths that the published models have."""
    if case.overview is None or (case.name == "internvl" and num == 256):
        return {"image": slice(0, num)}
    split = num - 256 if case.name == "internvl" else {"llava_next": 576, "llava_onevision": 729}[case.name]
    return {case.overview[0]: slice(0, split), case.overview[1]: slice(split, num)}


def picture(size: tuple[int, int], box: tuple[int, int, int, int] | None, mode: str = "RGB") -> Image.Image:
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    if box is not None:
        left, top, right, bottom = box
        pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels).convert(mode)


def place(case: Case, size: tuple[int, int], mode: str = "RGB") -> tuple[Geometry, Tensor]:
    """Geometry of a black image, and the brightness of its tokens."""
    out = case.process(picture(size, None, mode))
    dark = brightness(case, out)
    return geometry_of(published(case.name), span_of(case, out, len(dark)), size, case.prepare()), dark


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("label", CASES)
def test_the_token_that_turns_bright_lies_over_the_painted_place(label: str, size: tuple[int, int]) -> None:
    case = CASES[label]
    geometry, dark = place(case, size)
    rectangles = geometry.rectangles()
    groups = groups_of(case, geometry.num_tokens)
    assert [grid.kind for grid in geometry.grids] == list(groups)
    side = max(1, min(size) // 20)
    looked_at = 0
    for x, y in PLACES:
        left, top = (round((extent - side) * share) for extent, share in zip(size, (x, y), strict=True))
        square = (left, top, left + side, top + side)
        middle = torch.tensor([left + side / 2, top + side / 2], dtype=torch.float64)
        bright = (brightness(case, case.process(picture(size, square))) - dark).nan_to_num(-1.0)
        for grid in geometry.grids:
            tokens = bright[groups[grid.kind]]
            brightest = groups[grid.kind].start + int(tokens.argmax())
            # Half of the square, which may lie over the border of two cells. Tiles of 384 pixels hold 27 patches of 14,
            # which reach 378 of them only: a grid of even cells is off by up to 0.43 of a cell at the end of a tile.
            slack = side / 2 + (0.45 * max(grid.cell) if label == "llava_onevision" and grid.kind == "tiles" else 0.01)
            inside = min(*(middle - torch.tensor(grid.box[:2])), *(torch.tensor(grid.box[2:]) - middle))
            # Resampling reaches a few pixels beyond the square, of the image or of the crop (14 to a cell or more).
            if inside < -side / 2 - 3 * max(1.0, max(grid.cell) / 14):
                # Cut off. Between black and white there are 3.7.
                assert float(tokens.max()) < 0.04, (grid.kind, square)
            elif inside >= side / 2:
                low, high = rectangles[brightest, :2], rectangles[brightest, 2:]
                assert bool(((low - slack <= middle) & (middle <= high + slack)).all()), (grid.kind, square, low, high)
                looked_at += 1
    assert looked_at >= 3


@pytest.mark.parametrize("label", ["llava_onevision", "llava_onevision, two images"])
def test_pixels_that_fill_no_patch_are_seen_by_no_cell(label: str) -> None:
    """27 patches of 14 pixels reach 378 of a crop's 384: of 768 columns, the last 12."""
    case, size = CASES[label], (768, 768)
    geometry, dark = place(case, size)
    edge = (760, 0, 768, 768)
    bright = (brightness(case, case.process(picture(size, edge))) - dark)[:729]
    assert float(bright.max()) < 0.01
    assert float(geometry.cells_in(edge)[:729].sum()) == 0
    assert geometry.grids[0].box == pytest.approx((0, 0, 756, 756))


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (900, 4000), (7, 500)], ids=str)
@pytest.mark.parametrize("label", CASES)
def test_cells_tile_their_boxes_once_and_no_newline_has_one(label: str, size: tuple[int, int]) -> None:
    case = CASES[label]
    geometry, dark = place(case, size)
    rectangles = geometry.rectangles()
    numbers = torch.cat([grid.index.flatten() for grid in geometry.grids])
    assert numbers.min() >= 0
    assert numbers.unique().numel() == numbers.numel()
    # Newlines are the tokens whose brightness is none: exactly those have no rectangle.
    assert torch.equal(rectangles.isnan().any(dim=1), dark.isnan())
    for grid in geometry.grids:
        cells = rectangles[grid.index.flatten()].reshape(*grid.index.shape, 4)
        torch.testing.assert_close(cells[:, 1:, 0], cells[:, :-1, 2])
        torch.testing.assert_close(cells[1:, :, 1], cells[:-1, :, 3])
        corners = (*cells[0, 0, :2].tolist(), *cells[-1, -1, 2:].tolist())
        assert corners == pytest.approx(grid.box)


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (90, 400)], ids=str)
@pytest.mark.parametrize("label", CASES)
def test_a_constant_map_is_constant_where_the_model_sees(label: str, size: tuple[int, int]) -> None:
    geometry, _ = place(CASES[label], size)
    values = torch.full((geometry.num_tokens,), 0.3, dtype=torch.bfloat16)
    for mode in ("bilinear", "nearest", "exact"):
        plane = geometry.plane(values, mode)
        assert plane.shape == (size[1], size[0])
        seen = plane[~plane.isnan()]
        torch.testing.assert_close(seen, torch.full_like(seen, float(values[0])))
        x, y = (torch.arange(extent) + 0.5 for extent in size)
        under = torch.zeros(plane.shape, dtype=torch.bool)
        for left, top, right, bottom in (grid.box for grid in geometry.grids):
            under |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
        # Exact: also the pixels that a cell covers less than half of.
        assert bool((~plane.isnan())[under].all())
        assert mode == "exact" or torch.equal(~plane.isnan(), under)
    grid, box = geometry.grid(values)
    torch.testing.assert_close(grid, torch.full_like(grid, float(values[0])))
    assert box in [one.box for one in geometry.grids]


@pytest.mark.parametrize("label", CASES)
def test_a_single_cell_is_painted_inside_its_rectangle(label: str) -> None:
    geometry, _ = place(CASES[label], (640, 480))
    for grid in geometry.grids:
        alone = geometry.only(grid)
        rows, columns = grid.index.shape
        token = int(grid.index[rows // 2, columns // 3])
        one = torch.zeros(geometry.num_tokens)
        one[token] = 1
        left, top, right, bottom = geometry.rectangles()[token].tolist()
        width, height = grid.cell
        exact = alone.plane(one, "exact").nan_to_num(0.0)
        # Of a cell amid others, the exact painting keeps the area.
        assert float(exact.sum()) == pytest.approx(width * height)
        for mode in ("nearest", "exact"):
            y, x = alone.plane(one, mode).nan_to_num(0.0).nonzero(as_tuple=True)
            assert left - 1 < x.min() <= x.max() < right
            assert top - 1 < y.min() <= y.max() < bottom
        y, x = divmod(int(alone.plane(one).nan_to_num(0.0).argmax()), 640)
        assert left - 1 < x < right
        assert top - 1 < y < bottom


@pytest.mark.parametrize("label", CASES)
def test_kept_tokens_keep_their_places(label: str) -> None:
    case, size = CASES[label], (500, 300)
    out = case.process(picture(size, None))
    num = len(brightness(case, out))
    span = span_of(case, out, num)
    family, prepare = published(case.name), case.prepare()
    kept = torch.randperm(num, generator=torch.Generator().manual_seed(0))[: num // 3].sort().values
    few = geometry_of(family, replace(span, positions=kept, tokens=span.tokens.subset(kept)), size, prepare)
    full = geometry_of(family, span, size, prepare)
    torch.testing.assert_close(few.rectangles(), full.rectangles()[kept], equal_nan=True)
    assert [grid.box for grid in few.grids] == [grid.box for grid in full.grids]
    # A removed cell has no value, and lends its place to no neighbour.
    grid = few.grids[0]
    plane = few.only(grid).plane(torch.ones(len(kept)))
    gone = full.rectangles()[full.grids[0].index[grid.index < 0]]
    x, y = ((gone[:, :2] + gone[:, 2:]) / 2).floor().long().T
    over_the_image = (x >= 0) & (x < size[0]) & (y >= 0) & (y < size[1])
    assert bool(plane[y[over_the_image], x[over_the_image]].isnan().all())
    nothing = geometry_of(family, replace(span, positions=kept[:0], tokens=span.tokens.subset(kept[:0])), size, prepare)
    assert bool(nothing.plane(torch.empty(0)).isnan().all())


@pytest.mark.parametrize("label", CASES)
def test_grey_images_are_placed_like_coloured_ones(label: str) -> None:
    coloured, _ = place(CASES[label], (300, 500))
    grey, _ = place(CASES[label], (300, 500), "L")
    torch.testing.assert_close(grey.rectangles(), coloured.rectangles(), equal_nan=True)


def test_stretched_is_the_plain_resize_of_the_map() -> None:
    geometry, _ = place(CASES["llava"], (640, 480))
    values = torch.randn(576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = torch.nn.functional.interpolate(values.reshape(1, 1, 24, 24), (480, 640), mode="bilinear")[0, 0]
    torch.testing.assert_close(geometry.stretched().plane(values), plain)
    # The true one sees the middle 480 x 480 pixels alone.
    true = geometry.plane(values)
    assert bool(true[:, :80].isnan().all())
    assert bool(true[:, 560:].isnan().all())
    squeezed = torch.nn.functional.interpolate(values.reshape(1, 1, 24, 24), (480, 480), mode="bilinear")[0, 0]
    torch.testing.assert_close(true[:, 80:560], squeezed)


def test_the_exact_painting_of_a_tiny_image_is_the_mean_of_its_cells() -> None:
    geometry, _ = place(CASES["llava"], (1, 1))
    values = torch.arange(576.0)
    assert float(geometry.plane(values, "exact")) == pytest.approx(float(values.mean()))


def test_overlapping_grids_are_averaged_on_the_finest() -> None:
    fine = CellGrid(torch.arange(4).reshape(2, 2), (0.0, 0.0, 4.0, 4.0), "tiles")
    base = CellGrid(torch.tensor([[4]]), (0.0, 0.0, 8.0, 4.0), "base")
    geometry = Geometry((8, 4), 5, (base, fine))
    values = torch.tensor([1.0, 2.0, 3.0, torch.nan, 10.0])
    grid, box = geometry.grid(values)
    assert box == fine.box
    assert grid.tolist() == [[5.5, 6.0], [6.5, 10.0]]
    plane = geometry.plane(values, "nearest")
    assert plane[0].tolist() == [5.5, 5.5, 6.0, 6.0, 10.0, 10.0, 10.0, 10.0]
    assert geometry.cells_in((3.0, 0.0, 6.0, 2.0)).tolist() == [0.0, 0.5, 0.0, 0.0, 6 / 32]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_places_the_tokens_of_a_batch(name: str) -> None:
    model = build(name)
    family = resolve(model.model)
    inputs = model.inputs(batch=2, images=[1, 2])
    calls = encode(model, inputs)
    layout = build_layout(inputs["input_ids"], inputs["attention_mask"], family, calls)
    sizes = inputs.get("image_sizes")
    for span in layout.spans:
        height, width = (40, 30) if sizes is None else sizes[span.source].tolist()
        geometry = geometry_of(family, span, (width, height), tiny_processor(name))
        placed = span.tokens.crop >= 0
        assert torch.equal(~geometry.rectangles().isnan().any(dim=1), placed)
        assert sum(int((grid.index >= 0).sum()) for grid in geometry.grids) == int(placed.sum())
        assert geometry.plane(torch.rand(len(span))).shape == (height, width)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_every_temporal_step_of_a_video_is_a_grid(name: str) -> None:
    model = build(name)
    family = resolve(model.model)
    inputs = model.inputs(batch=1, images=0, videos=1)
    (span,) = build_layout(inputs["input_ids"], None, family, encode(model, inputs)).spans
    # Video processors need torchvision; of this one, only the settings are read.
    frames = SimpleNamespace(do_resize=True, size={"height": 16, "width": 16}, do_center_crop=None)
    geometry = geometry_of(family, span, (64, 32), SimpleNamespace(video_processor=frames))
    assert [grid.kind for grid in geometry.grids] == ["frame"] * 3
    assert all(grid.box == (0, 0, 64, 32) for grid in geometry.grids)
    second = geometry.grids[1]
    values = torch.zeros(geometry.num_tokens)
    values[second.index] = 3.0
    assert bool((geometry.only(second).plane(values) == 3).all())
    torch.testing.assert_close(geometry.plane(values), torch.ones(32, 64, dtype=torch.float64))


def tiny_processor(name: str) -> Any:
    """Image processors for the tiny shapes of the zoo."""
    square = {"height": 16, "width": 16}
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    if name == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    if name == "llava_next":
        return LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=square, image_grid_pinpoints=pinpoints)
    if name == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints)
    return None


def test_odd_padding_lies_where_the_backend_puts_it() -> None:
    settings = {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 10, "width": 10}}
    assert shown(SimpleNamespace(backend="pil", **settings), (7, 13), 1) == (-2, 1, 8, 11)
    assert shown(SimpleNamespace(backend="torchvision", **settings), (7, 13), 1) == (-1, 1, 9, 11)


def _generic(prepare: Any) -> Geometry:
    family = Family(published("llava").model)
    tokens = ImageTokens.raster([(24, 24)])
    return geometry_of(family, VisualSpan(0, 0, 0, "image", torch.arange(576), tokens), (640, 480), prepare)


def test_models_without_a_family_are_placed_where_their_processor_is_the_standard_one() -> None:
    known, _ = place(CASES["llava"], (640, 480))
    torch.testing.assert_close(_generic(CASES["llava"].prepare()).rectangles(), known.rectangles())
    with pytest.raises(PromptError, match=r"^where .* LlavaImageProcessorPil has a _preprocess of its own; [^\n]*$"):
        _generic(CASES["llava, padded to a square"].prepare())
    with pytest.raises(PromptError, match=r"^where .* CLIPImageProcessorPil pads images; [^\n]*$"):
        _generic(CLIPImageProcessorPil(**_CLIP, do_pad=True))


def test_what_cannot_be_placed_is_refused_in_one_line() -> None:
    case = CASES["llava"]
    span = span_of(case, case.process(picture((64, 64), None)), 576)
    family, prepare = published("llava"), case.prepare()
    with pytest.raises(PromptError, match=r"^what this model sees .* pass processor=\.\.\.$"):
        geometry_of(family, span, (64, 64), None)
    with pytest.raises(PromptError, match=r"^size is \(0, 64\); [^\n]*$"):
        geometry_of(family, span, (0, 64), prepare)
    with pytest.raises(PromptError, match=r"^which part of the image .* not known for LlavaFamily; [^\n]*$"):
        geometry_of(family, replace(span, tokens=ImageTokens.unknown(576)), (64, 64), prepare)
    with pytest.raises(PromptError, match=r"^size of CLIPImageProcessorPil is \{'longest_edge': 336\}; [^\n]*$"):
        geometry_of(family, span, (64, 64), CLIPImageProcessorPil(size={"longest_edge": 336}, crop_size=None))
    with pytest.raises(PromptError, match=r"has no video_processor, so it cannot have prepared a video$"):
        geometry_of(family, replace(span, modality="video"), (64, 64), SimpleNamespace(video_processor=None))
    geometry = geometry_of(family, span, (64, 64), prepare)
    with pytest.raises(PromptError, match=r"^values has shape \(575,\); .* 576 visual tokens is needed$"):
        geometry.plane(torch.ones(575))
    with pytest.raises(PromptError, match=r"^mode is 'cubic'; choose one of bilinear, nearest, exact$"):
        geometry.plane(torch.ones(576), "cubic")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"^box is \(5, 5, 5, 9\); [^\n]*$"):
        geometry.cells_in((5, 5, 5, 9))


def test_tiles_of_another_image_or_processor_are_refused() -> None:
    case = CASES["llava_next"]
    out = case.process(picture((640, 480), None))
    span = span_of(case, out, len(brightness(case, out)))
    family = published("llava_next")
    with pytest.raises(PromptError, match=r"^an image of 100 x 900 pixels has 3 x 1 tiles, [^\n]*$"):
        geometry_of(family, span, (100, 900), case.prepare())
    twice = LlavaNextImageProcessorPil(size={"shortest_edge": 400}, crop_size={"height": 336, "width": 336})
    with pytest.raises(PromptError, match=r"resizes or crops tiles of 336 pixels again, so they do not join; [^\n]*$"):
        geometry_of(family, span, (640, 480), twice)
