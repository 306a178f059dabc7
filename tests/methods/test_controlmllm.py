"""ControlMLLM: the region's cells and the loss by hand, offsets against full graphs with updates by formula."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.errors import MethodError, PromptError
from lmmhooks.methods.refinement.controlmllm import ControlMLLM
from lmmhooks.methods.refinement.pointing import closeness, distances, region_loss, sampled, steered
from lmmhooks.prompting import Prompter, answer
from tests.methods.looked import PROMPT, models, picture  # noqa: F401 # fixtures
from tests.reference import controlmllm as naive

LAYERS = (2, 3, 4)
REGION = (120, 40, 180, 90)


@pytest.fixture
def offsets(monkeypatch):
    """Every offset that is answered under, with the weights it was made for."""
    seen = []
    original = ControlMLLM.offset

    def offset(self, look, weights):
        seen.append((original(self, look, weights), weights))
        return seen[-1][0]

    monkeypatch.setattr(ControlMLLM, "offset", offset)
    return seen


@contextmanager
def looking(patch, processor, image, **kwargs):
    """What the method is given, as during an answer."""
    engine = patch._runtime.answering
    engine._asking = True
    try:
        yield engine.asker(Prompter(processor), image, PROMPT, kwargs)
    finally:
        engine._asking = False


# -- pure -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(260, 150), (150, 260), (336, 336), (900, 4000), (30, 20)])
@pytest.mark.parametrize("side", [8, 16])  # Divide 224, so that no pixel is picked by how a sum is rounded.
def test_regions_are_sampled_as_by_hand(size, side):
    generator = np.random.default_rng(size[0])
    mask = generator.random(size[::-1]) < 0.5
    assert (sampled(mask, side).numpy() == naive.sampled(mask, side)).all()
    gray = generator.integers(0, 256, size[::-1], dtype=np.uint8)
    assert np.allclose(sampled(gray, side).numpy() * 255, naive.sampled(gray, side))


def test_losses_of_all_kinds_of_region():
    attention = torch.tensor([0.1, 0.2, 0.3, 0.0])
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert float(region_loss(attention, mask, 400.0)) == pytest.approx(400 * (1 - 5 / 6) ** 2)
    assert float(region_loss(attention, mask, 400.0, 0.1)) == pytest.approx(400 * (1 - 5 / 7) ** 2)
    distance = torch.tensor([0.0, 0.1, 0.5, 1.0])
    density = [math.exp(-d * d / (2 * 0.1**2)) / (math.sqrt(2 * math.pi) * 0.1) for d in distance.tolist()]
    assert closeness(distance, 0.1).tolist() == pytest.approx(density)
    weighed = sum(a * w for a, w in zip(attention.tolist(), density, strict=True)) / 0.6
    assert float(region_loss(attention, closeness(distance, 0.1), 400.0)) == pytest.approx(400 * (1 - weighed) ** 2)


def test_losses_lie_between_0_and_alpha_and_everything_costs_nothing():
    attention = torch.rand(20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for count in range(21):
        mask = (torch.arange(20) < count).float()
        assert 0 <= float(region_loss(attention, mask, 400.0).detach()) <= 400 * (1 + 1e-6)
    whole = region_loss(attention, torch.ones(20), 400.0)
    (gradient,) = torch.autograd.grad(whole, [attention])
    # (1 - x / x)^2: its derivative has the factor 1 - x / x.
    assert float(whole.detach()) == pytest.approx(0, abs=1e-9)
    assert float(gradient.abs().max()) == pytest.approx(0, abs=1e-4)


def test_distances_grow_from_the_point():
    mask = np.zeros((40, 60), dtype=bool)
    mask[10, 20] = True
    found = distances(mask)
    assert found.dtype == np.uint8
    assert found[10, 20] == 0
    assert found.max() == found[39, 59] == 255
    far = math.hypot(29, 39)
    assert found[10, 30] == round(10 / far * 255)
    assert distances(np.ones((3, 3), dtype=bool)).max() == 0


def quadratic(offset):
    return ((offset - torch.arange(6.0).view(2, 3)) ** 2).sum() + offset.sin().sum()


@pytest.mark.parametrize("updates", [0, 1, 4])
def test_steps_are_those_by_formula(updates):
    start = torch.zeros(2, 3)
    found = steered(quadratic, start, updates=updates, lr=0.03)
    torch.testing.assert_close(found, naive.plus_plus(quadratic, start, updates, 0.03), rtol=1e-5, atol=1e-7)
    for stop in (None, 25.0):
        found = steered(
            quadratic, start, updates=updates, lr=0.1, optimizer="sgd", beta=0.5, accumulate=True, early_stop=stop
        )
        torch.testing.assert_close(found, naive.first_version(quadratic, torch.zeros(2, 3), updates, 0.1, 0.5, stop))
    assert bool((start == 0).all()), "what was given is left alone"


def test_a_rising_loss_ends_early():
    calls = []

    def rising(offset):
        calls.append(offset)
        return 1.0 + len(calls) + (offset**2).sum()

    steered(rising, torch.zeros(2), updates=5, lr=0.1, early_stop=25.0)
    assert len(calls) == 2


# -- on models --------------------------------------------------------------------------------------------------------


def naive_offset(eager, processor, image, weights, version, **settings):
    rows = "last" if version == "++" else "all"
    eps = 1e-6 if "qwen" in eager.config.model_type else 0.0

    def loss_of(offset):
        attentions, _, span = naive.attention_and_logits(eager, processor, image, PROMPT, offset)
        return naive.loss(attentions, span, weights, LAYERS, rows, 400.0, eps)

    start = torch.zeros(len(weights), eager.config.get_text_config().hidden_size)
    with torch.enable_grad():
        if version == "++":
            return naive.plus_plus(loss_of, start, settings["updates"], settings["lr"])
        return naive.first_version(loss_of, start, settings["updates"], settings["lr"], 0.5, None)


@pytest.mark.parametrize("version", ["++", "v1"])
def test_offsets_and_answers_are_those_of_full_graphs(models, picture, offsets, version):  # noqa: F811
    model, eager, processor = models
    more = {} if version == "++" else {"early_stop": None, "lr": 0.5}
    method = lmmhooks.method("controlmllm", preset=version, read_layers=LAYERS, **{"updates": 3, "lr": 0.05, **more})
    with lmmhooks.wrap(model, method, processor=processor) as patch:
        text = patch.answer(picture, PROMPT, region=REGION, max_new_tokens=4)
    [(found, weights)] = offsets
    expected = naive_offset(eager, processor, picture, weights, version, updates=3, lr=more.get("lr", 0.05))
    assert float(expected.abs().max()) > 1e-3
    # Adam divides by gradients that are small at first: float32 forwards that sum in another order differ by 1e-4 of
    # what they move.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
    with torch.no_grad():
        _, logits, _ = naive.attention_and_logits(eager, processor, picture, PROMPT, found)
    first = processor.tokenizer.decode([int(logits[-1].argmax())], skip_special_tokens=True).strip()
    assert text.startswith(first)


def test_attention_moves_into_the_region(models, picture):  # noqa: F811
    model, _, processor = models
    with lmmhooks.wrap(model, f"controlmllm(read_layers={LAYERS}, updates=4)", processor=processor) as patch:
        [method] = patch.methods

        def inside(look, offset):
            attention = look.steer(PROMPT, LAYERS, offset).detach()[:, :, -1].mean(dim=(0, 1))
            return float((attention * weights).sum() / attention.sum())

        with looking(patch, processor, picture) as look:
            weights = method.weights(look, REGION)
            offset = method.offset(look, weights)
            assert inside(look, offset) > inside(look, torch.zeros_like(offset)) + 0.01


def test_no_steps_is_the_model_alone(models, picture, offsets):  # noqa: F811
    model, _, processor = models
    plain = answer(model, processor, picture, PROMPT, max_new_tokens=6)
    for settings in ("updates=0", "lr=0.0"):
        with lmmhooks.wrap(model, f"controlmllm({settings}, read_layers={LAYERS})", processor=processor) as patch:
            assert patch.answer(picture, PROMPT, region=REGION, max_new_tokens=6) == plain
    assert all(bool((offset == 0).all()) for offset, _ in offsets)
    with lmmhooks.wrap(model, f"controlmllm(read_layers={LAYERS})", processor=processor) as patch:
        # The whole image: nothing is outside of it that attention could come from.
        patch.answer(picture, PROMPT, region=(0, 0, *picture.size), max_new_tokens=2)
    assert bool((offsets[-1][1] == 1).all())
    assert float(offsets[-1][0].abs().max()) < 1e-3


def test_cells_of_a_box_and_of_a_point(models, picture):  # noqa: F811
    model, _, processor = models
    with lmmhooks.wrap(model, f"controlmllm(read_layers={LAYERS})", processor=processor) as patch:
        [method] = patch.methods
        with looking(patch, processor, picture) as look:
            found = method.weights(look, REGION).reshape(look.geometry.grids[0].index.shape)
            if model.config.model_type == "llava":
                assert method.cells == "sampled"
                mask = np.zeros((150, 260), dtype=bool)
                mask[40:90, 120:180] = True
                assert (found.numpy() == naive.sampled(mask, 8)).all()
            else:
                rows, columns = found.shape
                window = np.zeros((rows, columns))
                top, bottom = math.floor(40 / (150 / rows)), math.ceil(90 / (150 / rows))
                left, right = math.floor(120 / (260 / columns)), math.ceil(180 / (260 / columns))
                window[top:bottom, left:right] = 1
                assert (found.numpy() == window).all()
            # One pixel is between all samples of the smaller image; the cell that holds it is meant.
            assert float(method.weights(look, (130.0, 70.0, 131.0, 71.0)).sum()) >= 1
            pointed = ControlMLLM(target="point").defaults_for(patch.family) | {"target": "point"}
            point = ControlMLLM(**pointed).weights(look, REGION)
            cells = look.geometry.rectangles()
            middle = torch.stack([(cells[:, 0] + cells[:, 2]) / 2 - 150, (cells[:, 1] + cells[:, 3]) / 2 - 65], dim=1)
            nearest, farthest = middle.norm(dim=1).argmin(), middle.norm(dim=1).argmax()
            assert point[nearest] > point[farthest] > 0
            assert float(point.max()) <= 1 / (math.sqrt(2 * math.pi) * 0.4) + 1e-6


def test_what_the_model_does_not_see_is_refused():
    model, processor = lmmhooks.load("tiny-llava", dtype=torch.float32)
    wide = Image.new("RGB", (400, 100))
    with lmmhooks.wrap(model, f"controlmllm(read_layers={LAYERS})", processor=processor) as patch:
        with pytest.raises(PromptError, match="sees nothing of region"):
            patch.answer(wide, PROMPT, region=(0, 0, 50, 100), max_new_tokens=2)
        with pytest.raises(PromptError, match="is no part of the image"):
            patch.answer(wide, PROMPT, region=(0, 0, 500, 100), max_new_tokens=2)
        with pytest.raises(PromptError, match="needs a region"):
            patch.answer(wide, PROMPT, max_new_tokens=2)
        with pytest.raises(PromptError, match="one image"):
            patch.answer([wide, wide], PROMPT, region=(0, 0, 50, 100), max_new_tokens=2)
        text = patch.answer(None, PROMPT, max_new_tokens=2)
    assert text == answer(model, processor, None, PROMPT, max_new_tokens=2)


def test_another_method_points_where_the_caller_does_not(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    boxes = []
    original = ControlMLLM.weights
    monkeypatch.setattr(ControlMLLM, "weights", lambda self, look, box: boxes.append(box) or original(self, look, box))
    spec = f"controlmllm(read_layers={LAYERS}, updates=1, map='vicrop-rel(layer=3)')"
    with lmmhooks.wrap(model, spec, processor=processor) as patch:
        [method] = patch.methods
        with looking(patch, processor, picture) as look:
            plane = method.source.saliency(look).plane()
        patch.answer(picture, PROMPT, max_new_tokens=2)
        patch.answer(picture, PROMPT, region=REGION, max_new_tokens=2)
    found, given = boxes
    assert given == REGION
    left, top, right, bottom = found
    assert 0 <= left < right <= 260
    assert 0 <= top < bottom <= 150
    # The largest value is in the best region, up to ties.
    inside = plane[top:bottom, left:right]
    assert float(inside.mean()) > float(plane.mean())


def test_a_flat_map_leaves_the_model_alone(models, picture, monkeypatch):  # noqa: F811
    model, _, processor = models
    monkeypatch.setattr("lmmhooks.methods.refinement.saliency.Saliency.spread", 0.0)
    spec = f"controlmllm(read_layers={LAYERS}, map='vicrop-rel(layer=3)')"
    with lmmhooks.wrap(model, spec, processor=processor) as patch:
        text = patch.answer(picture, PROMPT, max_new_tokens=4)
    assert text == answer(model, processor, picture, PROMPT, max_new_tokens=4)


def test_published_settings_by_family(models):  # noqa: F811
    model, _, processor = models
    with lmmhooks.wrap(model, "controlmllm(alpha=100.0)", processor=processor) as patch:
        [method] = patch.methods
    if model.config.model_type == "llava":
        # 14 to 25 of 32 layers are 4 and 5 of 8.
        assert (method.updates, method.lr, method.epsilon, method.read_layers) == (3, 0.03, 0.0, (4, 5))
    else:
        assert (method.updates, method.lr, method.epsilon, method.read_layers) == (1, 0.02, 1e-6, (3, 4, 5, 6, 7))
    assert lmmhooks.method("controlmllm", **method.settings()).spec() == method.spec()
    with lmmhooks.wrap(model, "controlmllm(preset='v1')", processor=processor) as patch:
        [method] = patch.methods
    assert (method.updates, method.lr, method.rows, method.read_layers) == (5, 1.0, "all", tuple(range(8)))


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0},
        {"updates": -1},
        {"lr": -0.1},
        {"optimizer": "lion"},
        {"beta": 0},
        {"early_stop": 0},
        {"read_layers": ()},
        {"read_layers": "some"},
        {"rows": "first"},
        {"cells": "many"},
        {"target": "line"},
        {"sigma": 0},
        {"epsilon": -1},
        {"share": 0},
        {"map": "vcd"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=next(iter(settings))):
        ControlMLLM(**settings)


def test_layers_that_a_model_has_not_are_refused(models):  # noqa: F811
    model, _, processor = models
    with pytest.raises(MethodError, match="beyond the 8"):
        lmmhooks.wrap(model, "controlmllm(read_layers=(7, 8))", processor=processor)
