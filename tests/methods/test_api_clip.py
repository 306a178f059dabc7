"""Attention prompting with CLIP: contributions against the model's own attention, maps against loops over patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError
from lmmhooks.methods.refinement.api_clip import contributions, joined, load_clip
from lmmhooks.methods.refinement.operators import fade
from lmmhooks.prompting import answer
from tests.clips import tiny_clip
from tests.methods.looked import PROMPT, looked, models, picture  # noqa: F401 # fixtures
from tests.reference import looking_again as naive


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a tiny CLIP with random weights and a tokenizer of single letters."""
    return tiny_clip(tmp_path_factory.mktemp("clip"))["clip"]


def test_contributions_sum_to_the_attention_of_the_class_token(clip):
    model = load_clip(clip).model
    block = model.vision_model.encoder.layers[2]
    hidden = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block.self_attn(block.layer_norm1(hidden))[0][0, 0]
        torch.testing.assert_close(contributions(block, hidden[0]).sum(dim=0), expected, atol=1e-5, rtol=1e-5)


def test_maps_are_those_of_loops_over_patches(clip, picture):  # noqa: F811
    found = load_clip(clip)
    model, vision = found.model, found.model.vision_model
    with torch.no_grad():
        pixels = found.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        states = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
        final = states[-1][0, 0].double()
        text = model.get_text_features(**found.tokenizer([PROMPT], truncation=True, return_tensors="pt"))
        text = getattr(text, "pooler_output", text)[0].double()
        image = model.get_image_features(pixel_values=pixels)
        image = getattr(image, "pooler_output", image)[0].double()
        added = contributions(vision.encoder.layers[2], states[2][0]).double()
        norm = vision.post_layernorm
        deviation = ((final**2).mean() - final.mean() ** 2 + norm.eps).sqrt()

        def relation(part, share):
            normed = norm.weight.double() * (part - final.mean() / share) / deviation + norm.bias.double() / share
            projected = model.visual_projection.weight.double() @ normed
            return float(projected @ text / text.norm() / image.norm())

        # Four layers: 2 x 4 - 1 parts; 50 keys.
        of_class = [[relation(added[1 + 7 * y + x], 7 * 50) for x in range(7)] for y in range(7)]
        of_patches = [[relation(states[3][0, 1 + 7 * y + x].double(), 7) for x in range(7)] for y in range(7)]
    for map_, expected in zip(found.maps(picture, PROMPT, 2), (of_class, of_patches), strict=True):
        torch.testing.assert_close(map_, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_both_maps_become_one_mask():
    generator = torch.Generator().manual_seed(2)
    of_class, of_patches = torch.rand(6, 7, generator=generator), torch.rand(6, 7, generator=generator)
    first = np.array(naive.soft_mask(of_class.tolist(), 5.0, 3))
    inverted = (of_patches.max() - of_patches) / (of_patches.max() - of_patches.min())
    padded = np.pad(inverted.numpy(), 1, mode="edge")
    second = np.array([[padded[y : y + 3, x : x + 3].mean() for x in range(7)] for y in range(6)])
    union = first + second - first * second
    expected = (union - union.min()) / (union.max() - union.min())
    # Float32 against float64.
    np.testing.assert_allclose(joined(of_class, of_patches, 5.0, 3), expected, atol=1e-5)
    assert joined(torch.ones(3, 3), torch.ones(3, 3), 5.0, 3).eq(1).all()


def test_the_answer_is_about_what_clip_leaves(models, picture, monkeypatch, clip):  # noqa: F811
    model, _, processor = models
    spec = f"api-clip(clip={clip!r}, geometry='official')"
    text, found, shown = looked(monkeypatch, model, processor, spec, picture)
    maps = load_clip(clip).maps(picture, PROMPT, 2)
    mask = joined(*maps, 5.0, 3)
    torch.testing.assert_close(found.values, mask.flatten().double())
    small = Image.fromarray((mask * 255).byte().numpy())
    expected = fade(picture, small.resize(picture.size, Image.Resampling.LANCZOS), 0)
    assert [image.tobytes() for image in shown] == [expected.tobytes()]
    assert text == answer(model, processor, shown, PROMPT, max_new_tokens=4)
    _, found, _ = looked(monkeypatch, model, processor, f"api-clip(clip={clip!r})", picture)
    left, top, right, bottom = found.grid()[1]
    # The middle square of 260 x 150, at 28 pixels: to a pixel of that.
    assert (left, right) == pytest.approx((55, 205), abs=260 / 48)
    assert (top, bottom) == (0, 150)


def test_long_questions_and_small_pictures(clip):
    found = load_clip(clip)
    for size in ((3, 90), (1, 1)):
        maps = found.maps(Image.new("RGB", size), "what is that " * 40, 1)
        assert all(map_.isfinite().all() for map_ in maps)


def test_what_cannot_be_loaded_is_refused_when_wrapping(models, tmp_path):  # noqa: F811
    model, _, processor = models
    with pytest.raises(MethodError, match="cannot be loaded"):
        lmmhooks.wrap(model, f"api-clip(clip={str(tmp_path)!r})", processor=processor)


def test_layers_of_clip_are_checked(models, clip):  # noqa: F811
    model, _, processor = models
    with pytest.raises(MethodError, match="layer=4 is not allowed"):
        lmmhooks.wrap(model, f"api-clip(clip={clip!r}, layer=4)", processor=processor)
    for settings in ({"kernel": 2}, {"contrast": 0}, {"resampling": "x"}, {"background": -1}):
        with pytest.raises(MethodError, match=next(iter(settings))):
            lmmhooks.method("api-clip", **settings)
