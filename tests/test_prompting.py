"""Images in every mode and orientation, against what transformers' own loader makes of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from lmmhooks.errors import PromptError
from lmmhooks.prompting import open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
#: Exif tag of the orientation.
ORIENTATION = 0x0112
#: What turns stored pixels upright, by orientation.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "photo.png"
    RGB.save(path, exif=exif)
    expected = UPRIGHT[orientation](PIXELS)
    for source in (path, str(path), Image.open(path)):
        found = open_image(source)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), expected)
        # Once upright, it stays so.
        np.testing.assert_array_equal(np.asarray(open_image(found)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(str(path))), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "PA", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_modes_become_rgb_as_transformers_has_it(mode):
    image = RGB.convert("I").convert("I;16") if mode == "I;16" else RGB.convert(mode)
    found = open_image(image)
    assert (found.mode, found.size) == ("RGB", image.size)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(image)))


def test_transparency_does_not_change_colours(tmp_path: Path):
    image = RGB.convert("RGBA")
    image.putalpha(Image.fromarray(PIXELS[..., 0]))
    image.save(tmp_path / "clear.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "clear.png")), PIXELS)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpegs_that_are_no_rgb(mode, tmp_path: Path):
    path = tmp_path / "print.jpg"
    RGB.convert(mode).save(path, quality=95)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(Image.open(path).convert("RGB")))


def test_what_cannot_be_opened_is_named(tmp_path: Path):
    stream = io.BytesIO()
    RGB.save(stream, "PNG")
    (tmp_path / "cut.png").write_bytes(stream.getvalue()[:60])
    with pytest.raises(PromptError, match=r"cut\.png' cannot be decoded"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(PromptError, match="does not exist"):
        open_image(tmp_path / "none.png")
    with pytest.raises(PromptError, match="not ndarray"):
        open_image(PIXELS)
