"""Padding of images to a square: the published LLaVA-1.5 pipeline, which its Hugging Face processor does not follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lmmhooks_eval.errors import RecipeError
from lmmhooks_eval.generate import Generator, padded_to_square
from lmmhooks_eval.loading import load_model
from lmmhooks_eval.recipes import build

GREY = (10, 20, 30)


@pytest.fixture(scope="module")
def loaded(model_folder: Any) -> tuple[Any, Any]:
    return load_model(build({"name": "r", "model": str(model_folder), "tasks": ["scenes-pope"]}, "test"))


@pytest.mark.parametrize(("size", "box"), [((9, 4), (0, 2, 9, 6)), ((4, 9), (2, 0, 6, 9)), ((7, 4), (0, 1, 7, 5))])
def test_the_image_is_in_the_middle_of_one_colour(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = Image.new("RGB", size, (200, 0, 0))
    square = padded_to_square(image, GREY)
    side = max(size)
    assert square.size == (side, side)
    assert square.crop(box).tobytes() == image.tobytes()
    colours = {colour: count for count, colour in square.getcolors()}
    assert colours == {(200, 0, 0): size[0] * size[1], GREY: side * side - size[0] * size[1]}


def test_a_square_stays_the_very_same_image() -> None:
    image = Image.new("RGB", (5, 5))
    assert padded_to_square(image, GREY) is image


def test_nothing_is_cropped_any_more(loaded: tuple[Any, Any]) -> None:
    """A mark at the edge of a wide image is lost to the processor's centre crop, and kept when padded."""
    model, processor = loaded
    plain = Image.new("RGB", (336, 112), (0, 0, 0))
    marked = plain.copy()
    marked.paste((255, 255, 255), (0, 0, 60, 112))

    def pixels(image: Any, **settings: Any) -> torch.Tensor:
        generator = (
            Generator(model, processor, pad_to_square=True) if settings.get("pad") else Generator(model, processor)
        )
        return generator.inputs(["USER: <image>\n? ASSISTANT:"], [[image]])["pixel_values"]

    assert torch.equal(pixels(plain), pixels(marked))
    assert not torch.equal(pixels(plain, pad=True), pixels(marked, pad=True))
    # The margin is the mean colour, so after normalisation it is 0 up to the rounding of a colour to 1/255.
    margin = pixels(plain, pad=True)[0, :, :30]
    assert margin.abs().max() < 1 / 255 / min(processor.image_processor.image_std) + 1e-6


def test_a_processor_without_a_mean_colour_is_refused(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    bare = SimpleNamespace(image_processor=SimpleNamespace(), tokenizer=processor.tokenizer)
    with pytest.raises(RecipeError, match="pad_to_square needs the image processor's mean colour"):
        Generator(model, bare, pad_to_square=True)
