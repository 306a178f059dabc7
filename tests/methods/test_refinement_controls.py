"""Controls of methods that add a picture: which pictures, of which size, and that nothing was looked at for them."""

from __future__ import annotations

import pytest

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.refinement.budget_matched import grid_of
from lmmhooks.methods.refinement.controls import window
from lmmhooks.prompting import answer, build_inputs
from tests.engines.lookers import BUNDLED, PROMPT, loaded, noise
from tests.processing import processor_of
from tests.zoo import build

IMAGE = noise(120, 80)
KWARGS = {"max_new_tokens": 3, "do_sample": False}


def shown(name, spec, image=IMAGE, **kwargs):
    """Answer, and the pictures that it is about."""
    model, processor = loaded(name)
    with lmmhooks.wrap(model, spec, processor=processor) as patch:
        text = patch.answer(image, PROMPT, **KWARGS, **kwargs)
        engine = patch._runtime.answering
        # One prompt was read, and no more images than are shown.
        assert engine.once.num_encoded <= len(engine.looked_at)
        return text, engine.looked_at


def same(pictures, expected):
    assert [(one.size, one.tobytes()) for one in pictures] == [(one.size, one.tobytes()) for one in expected]


@pytest.mark.parametrize("name", BUNDLED)
def test_pictures_are_those_that_are_announced(name):
    model, processor = loaded(name)
    cases = {
        "same-image-twice": [IMAGE, IMAGE],
        "centre-crop": [IMAGE, IMAGE.crop((30, 20, 90, 60))],
        "centre-crop(share=0.01, show='refined')": [IMAGE.crop((54, 36, 66, 44))],
        "centre-crop(share=1.0)": [IMAGE, IMAGE],
    }
    for spec, expected in cases.items():
        text, pictures = shown(name, spec)
        same(pictures, expected)
        assert text == answer(model, processor, expected, PROMPT, **KWARGS)


def test_the_oracle_shows_what_the_caller_points_at():
    cases = {
        "oracle-crop": (10, 20, 50, 40),
        "oracle-crop(margin=0.5)": (0, 0, 70, 60),
        "oracle-crop(margin=9.0)": (0, 0, 120, 80),
    }
    for spec, box in cases.items():
        _, pictures = shown("tiny-llava", spec, region=(10, 20, 50, 40))
        same(pictures, [IMAGE, IMAGE.crop(box)])
    with pytest.raises(PromptError, match=r"region=\(left, top, right, bottom\)"):
        shown("tiny-llava", "oracle-crop")


def test_random_crops_depend_on_image_and_seed_alone():
    def crop(image, seed=0, **kwargs):
        return shown("tiny-llava", f"random-crop(seed={seed})", image, **kwargs)[1][1]

    first = crop(IMAGE)
    assert first.size == (60, 40)
    same([crop(IMAGE.copy())], [first])
    assert crop(IMAGE, seed=1).tobytes() != first.tobytes()
    assert crop(noise(120, 80, seed=1)).tobytes() != first.tobytes()


def test_random_places_cover_the_image():
    boxes = [window((100, 60), 0.25, across, down) for across in (0, 0.5, 1) for down in (0, 1)]
    assert boxes == [(0, 0, 50, 30), (0, 30, 50, 60), (25, 0, 75, 30), (25, 30, 75, 60), (50, 0, 100, 30),
                     (50, 30, 100, 60)]  # fmt: skip
    assert window((3, 1000), 1e-6, 1.0, 1.0) == (2, 999, 3, 1000)


@pytest.mark.parametrize("ratio", [0.5, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_matched_budget_is_realised(family, ratio):
    model, processor = build(family).model, processor_of(family)
    image = noise(90, 60)
    token = model.config.image_token_id
    plain = int((build_inputs(processor, [image], PROMPT)["input_ids"] == token).sum())
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int((kwargs["input_ids"] == token).sum())), with_kwargs=True
    )
    with handle, lmmhooks.wrap(model, f"budget-matched(ratio={ratio})", processor=processor) as patch:
        patch.answer(image, PROMPT, max_new_tokens=1)
    assert seen[-1] == pytest.approx(ratio * plain, rel=0.1)
    assert len(build_inputs(processor, [image], PROMPT)["pixel_values"]) == 4 * plain, "the processor is as it was"


def test_the_nearest_grid_is_found():
    for size in ((640, 480), (100, 900), (33, 31)):
        for tokens in (7, 64, 128, 500.5):
            columns, rows = grid_of(size, tokens)
            scale = (tokens / (size[0] * size[1])) ** 0.5
            assert abs(columns - size[0] * scale) < 1 or columns == 1
            assert abs(rows - size[1] * scale) < 1 or rows == 1
            for other in ((c, r) for c in (columns - 1, columns, columns + 1) for r in (rows - 1, rows, rows + 1)):
                inside = all(abs(o - s * scale) < 1 and o > 0 for o, s in zip(other, size, strict=True))
                assert not inside or abs(columns * rows - tokens) <= abs(other[0] * other[1] - tokens)


def test_a_budget_that_cannot_be_matched_is_refused():
    with pytest.raises(MethodError, match="compare with same-image-twice"):
        lmmhooks.wrap(loaded("tiny-llava")[0], "budget-matched")
    with pytest.raises(PromptError, match="raise tolerance"):
        shown("tiny-qwen", "budget-matched(ratio=1.02, tolerance=0.0)", noise(61, 50))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("centre-crop", {"share": 0.0}), ("random-crop", {"share": 1.1}), ("oracle-crop", {"margin": -0.1}),
     ("centre-crop", {"show": "all"}), ("budget-matched", {"ratio": 0}), ("budget-matched", {"tolerance": -1})],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name, settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        lmmhooks.method(name, **settings)


@pytest.mark.parametrize("name", ["same-image-twice", "centre-crop", "random-crop"])
def test_odd_pictures_and_no_picture(name):
    model, processor = loaded("tiny-llava")
    for image in (noise(3, 2), noise(90, 400).convert("L"), noise(20, 20).convert("CMYK")):
        assert len(shown("tiny-llava", name, image)[1]) == 2
    plain = answer(model, processor, None, "Hello?", **KWARGS)
    with lmmhooks.wrap(model, name, processor=processor) as patch:
        assert patch.answer(None, "Hello?", **KWARGS) == plain
        with pytest.raises(PromptError, match="one image"):
            patch.answer([IMAGE, IMAGE], PROMPT)
