"""Hidden states that directions are made of, against those transformers itself reports."""

from __future__ import annotations

import pytest
import torch

import lmmhooks
from lmmhooks.engines.runtime import Runtime, find_runtime
from lmmhooks.engines.states import last_states, mask_patches, masked, vision_states
from lmmhooks.family import resolve
from tests.zoo import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_last_states_are_those_of_the_last_position(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=2)
    with torch.no_grad():
        expected = zoo.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        normed = zoo.model.model.language_model.norm
        states = last_states(Runtime(resolve(zoo.model)), inputs)
    assert states.shape == (2, 5, 64)
    torch.testing.assert_close(states[:, :4], torch.stack([hidden[:, -1] for hidden in expected[:4]], dim=1))
    # What transformers lists last is behind the final norm.
    with torch.no_grad():
        torch.testing.assert_close(normed(states[:, 4]), expected[4][:, -1])


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_states_of_towers_that_see_crops_keep_their_positions(family):
    zoo = build(family)
    inputs = zoo.inputs(batch=1)
    states = vision_states(Runtime(resolve(zoo.model)), inputs)
    assert states.shape == (4, 17, 32)
    tower, pixels = zoo.model.model.vision_tower, inputs["pixel_values"].flatten(0, -4)
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, torch.stack([layer.mean(dim=0) for layer in hidden]))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_states_of_towers_that_see_packed_patches_are_means(family):
    zoo = build(family)
    runtime = Runtime(resolve(zoo.model))
    first = zoo.inputs(batch=1, seed=1)
    states = vision_states(runtime, first)
    assert states.shape == (5, 1, 32)
    torch.testing.assert_close(vision_states(runtime, first), states)
    assert (vision_states(runtime, zoo.inputs(batch=1, seed=2)) - states).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_goes_through_the_packing_of_every_family(family):
    zoo = build(family)
    runtime = Runtime(resolve(zoo.model))
    inputs = zoo.inputs(batch=2)
    untouched = masked(runtime, inputs, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(untouched["pixel_values"], inputs["pixel_values"])
    hidden = masked(runtime, inputs, 0.5, torch.Generator().manual_seed(0))
    assert hidden["pixel_values"].shape == inputs["pixel_values"].shape
    changed = (hidden["pixel_values"] != inputs["pixel_values"]).float().mean()
    # Padding crops and rounding down take a little off a half.
    assert 0.3 < changed <= 0.5
    assert (vision_states(runtime, hidden) - vision_states(runtime, inputs)).abs().max() > 1e-2
    assert hidden.keys() == inputs.keys()


def test_masked_patches_show_the_mean_colour():
    image = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(0))
    out = mask_patches(image, 4, 0.5, torch.Generator().manual_seed(0))
    same = [
        torch.equal(out[:, r : r + 4, c : c + 4], image[:, r : r + 4, c : c + 4]) for r in (0, 4) for c in (0, 4, 8)
    ]
    assert sum(same) == 3
    place = same.index(False)
    patch = out[:, place // 3 * 4 :, place % 3 * 4 :][:, :4, :4]
    torch.testing.assert_close(patch, image.mean(dim=(1, 2), keepdim=True).expand(3, 4, 4))
    # The ninth row belongs to no whole patch.
    assert torch.equal(out[:, 8], image[:, 8])
    assert torch.equal(mask_patches(image, (3, 6), 0.1, torch.Generator()), image)


def test_patches_of_a_wrapped_model_are_suspended():
    zoo = build("llava")
    inputs = zoo.inputs(batch=1)
    expected = last_states(Runtime(resolve(zoo.model)), inputs)
    with lmmhooks.wrap(zoo.model, "act(heads='all', thr=0.05)") as patch:
        attached = patch.attached
        assert torch.equal(last_states(find_runtime(zoo.model), inputs), expected)
        assert patch.attached == attached
    assert not any(layer._forward_hooks for layer in zoo.model.model.language_model.layers)
