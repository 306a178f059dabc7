"""What methods that look again are tested on: the bundled models, plain and with eager attention, and their maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.methods.refinement.saliency import Saliency

PROMPT = "What is the color of the circle?"


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """A bundled model, the same with eager attention, and its processor."""
    model, processor = lmmhooks.load(request.param, dtype=torch.float32)
    eager, _ = lmmhooks.load(request.param, dtype=torch.float32, attn_implementation="eager")
    return model, eager, processor


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Wider than high, structured everywhere."""
    generator = np.random.default_rng(3)
    coarse = Image.fromarray(generator.integers(0, 256, (15, 26, 3), dtype=np.uint8))
    return coarse.resize((260, 150), Image.Resampling.BICUBIC)


def looked(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    processor: Any,
    spec: Any,
    image: Any,
    prompt: str = PROMPT,
    **kwargs: Any,
) -> tuple[str, Saliency, list[Image.Image]]:
    """Answer of a wrapped model, the map it was made with, and the pictures it is about."""
    maps: list[Saliency] = []
    with lmmhooks.wrap(model, spec, processor=processor) as patch:
        [method] = patch.methods
        original = type(method).saliency

        def saliency(self: Any, look: Any) -> Saliency:
            maps.append(original(self, look))
            return maps[-1]

        with monkeypatch.context() as context:
            context.setattr(type(method), "saliency", saliency)
            text = patch.answer(image, prompt, **{"max_new_tokens": 4, **kwargs})
        return text, maps[0], list(patch._runtime.answering.looked_at)
