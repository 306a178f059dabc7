"""A method that hands its look to the test, models with processors to look with, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import lmmhooks
from lmmhooks.engines.looking import Looker, LookingEngine
from lmmhooks.methods.base import setting
from lmmhooks.methods.refinement.base import RefinementMethod
from lmmhooks.prompting import Prompter
from tests.processing import processor_of
from tests.zoo import FAMILIES, build

PROMPT = "What is the color of the circle?"
BUNDLED = ("tiny-llava", "tiny-qwen")
MODELS = (*BUNDLED, *FAMILIES)


@dataclass(frozen=True)
class Looks(RefinementMethod):
    """Does what a test wants, and answers with what the test returns."""

    id: ClassVar[str] = "looks"
    read: tuple[int, ...] = setting((1, 2), help="Layers that are read.")
    act: Callable[..., Any] | None = field(default=None, compare=False)

    def layers(self, family: Any) -> tuple[int, ...]:
        return self.read

    def gradient_layers(self, family: Any) -> tuple[int, ...]:
        return tuple(range(family.num_layers))

    def answer(self, ask: Any, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        assert self.act is not None
        return self.act(ask, prompt, **generate_kwargs)  # type: ignore[no-any-return]


@cache
def loaded(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A bundled model or one of the zoo, with its processor; leave it as it is."""
    if name in BUNDLED:
        return lmmhooks.load(name, dtype=dtype, attn_implementation=attn)
    return build(name, attn=attn, dtype=dtype).model, processor_of(name)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@contextmanager
def looking(
    model: Any, processor: Any, image: Image.Image, *beside: Any, prompt: str = PROMPT, **settings: Any
) -> Iterator[tuple[Looker, LookingEngine]]:
    """What a method is given in front of an image, and the engine; the model is as it was at the end."""
    with lmmhooks.wrap(model, *beside, Looks(**settings), processor=processor) as patch:
        engine = patch._runtime.answering
        assert isinstance(engine, LookingEngine)
        engine._asking = True
        yield engine.asker(Prompter(processor), image, prompt, {}), engine


def without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of engines made from now on reads everything."""
    original = LookingEngine.__init__

    def alone(self: LookingEngine, runtime: Any, methods: Any) -> None:
        original(self, runtime, methods)
        self.once.shares = False

    monkeypatch.setattr(LookingEngine, "__init__", alone)
