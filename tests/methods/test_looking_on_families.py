"""Methods that search, steer and trace, on every family whose processor can be built in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.engines.looking import Looker
from lmmhooks.methods.refinement import zoom_prompts
from lmmhooks.methods.refinement.controlmllm import ControlMLLM
from lmmhooks.methods.refinement.zoomeye import ZoomEye
from tests.methods.looked import looked
from tests.processing import processor_of
from tests.reference import controlmllm as steered
from tests.reference import vl_sam as traced
from tests.reference import zoomeye as searched
from tests.zoo import FAMILIES, build

PROMPT = "Is it red?"
#: All layers of these models.
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A model, the same with eager attention, and a processor."""
    return build(request.param).model, build(request.param, attn="eager").model, processor_of(request.param)


@pytest.fixture(scope="module")
def image():
    coarse = Image.fromarray(np.random.default_rng(5).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return coarse.resize((54, 36), Image.Resampling.BICUBIC)


def test_confidences_are_those_of_full_forwards(family, image, monkeypatch):
    model, eager, processor = family
    heard = []
    original = ZoomEye._certainty

    def certainty(self, look, template, thing, shown):
        heard.append((shown, template.format(thing), original(self, look, template, thing, shown)))
        return heard[-1][2]

    monkeypatch.setattr(ZoomEye, "_certainty", certainty)
    searching = {"threshold": 1.0, "floor": 0.9, "pops_per_level": 9, "max_depth": 1}
    method = ZoomEye(side=32, view="global", cues="question", words=("Y", "N"), **searching)
    with lmmhooks.wrap(model, method, processor=processor) as patch:
        patch.answer(image, "Is there a cat?", max_new_tokens=2)
    assert {len(pictures or [image]) for pictures, _, _ in heard} == {1, 2}
    before = (zoom_prompts.MAIN_IMAGE.format("red"), zoom_prompts.ZOOMED_IMAGE)
    mark = "<start><image><end>" if "qwen" in model.config.model_type else "<image>"
    for pictures, prompt, value in heard:
        texts = [prompt] if pictures is None else [before[0], before[1] + prompt]
        written = "<s>user: " + "".join(mark + text for text in texts) + " assistant:"
        # Float32 forwards, of which one begins in the middle of the prompt.
        assert value == pytest.approx(
            searched.yes(eager, processor, pictures or [image], written, ("Y", "N")), abs=1e-4
        )


def test_offsets_are_those_of_full_graphs(family, image, monkeypatch):
    model, eager, processor = family
    seen = []
    original = ControlMLLM.offset
    monkeypatch.setattr(
        ControlMLLM, "offset", lambda self, look, w: seen.append((original(self, look, w), w)) or seen[-1][0]
    )
    method = ControlMLLM(read_layers=LAYERS, updates=2, lr=0.05, cells="touched", epsilon=0.0)
    with lmmhooks.wrap(model, method, processor=processor) as patch:
        patch.answer(image, PROMPT, region=(20, 10, 35, 26), max_new_tokens=2)
    [(found, weights)] = seen
    assert 0 < float(weights.sum()) < len(weights)

    def loss_of(offset):
        attentions, _, span = steered.attention_and_logits(eager, processor, image, PROMPT, offset)
        return steered.loss(attentions, span, weights, LAYERS, "last", 400.0, 0.0)

    with torch.enable_grad():
        expected = steered.plus_plus(loss_of, torch.zeros_like(found), 2, 0.05)
    # Adam divides by gradients, and float32 forwards that sum in another order differ.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


def test_flows_are_those_of_one_full_forward(family, image, monkeypatch):
    model, eager, processor = family
    replies = []
    original = Looker.matrices

    def matrices(self, prompt, reply, fold):
        replies.append(list(reply))
        return original(self, prompt, reply, fold)

    monkeypatch.setattr(Looker, "matrices", matrices)
    monkeypatch.setattr("lmmhooks.methods.refinement.vl_sam.content_pieces", lambda pieces, find: [True] * len(pieces))
    _, found, _ = looked(monkeypatch, model, processor, "vl-sam(max_new_tokens=3)", image, PROMPT)
    [reply] = replies
    flow, places = traced.answer_flow(eager, processor, image, PROMPT, reply, "layer")
    expected = flow[-len(reply) :][:, places].mean(dim=0)
    torch.testing.assert_close(found.values, expected.double(), rtol=1e-4, atol=1e-6 * float(expected.max()))
