"""Steering methods that exist only in tests, and their naive counterparts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lmmhooks.methods.attention.steering import SteeringMethod

# float32, a few layers, another order of summation; largest difference seen is 4e-6.
TOLERANCE = 1e-5
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
SEVERAL = ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"]


@dataclass(frozen=True)
class Push(SteeringMethod):
    """Adds to every MLP output what depends on its input, layer and output."""

    id: ClassVar[str] = "test-push"

    def edit_mlp(self, inputs, outputs, context):
        return outputs + 0.2 * (1 + context.layer) * torch.tanh(inputs)


@dataclass(frozen=True)
class Blend(SteeringMethod):
    """Blends the outputs of two layers into what the head reads."""

    id: ClassVar[str] = "test-blend"

    def read_layers(self, family):
        return (1, 2)

    def read_layer(self, hidden, context):
        context.memory[context.layer] = hidden, context.spread

    def mix_output(self, normed, context):
        for hidden, spread in (context.memory[layer] for layer in (1, 2)):
            normed = normed + 0.3 * spread(hidden, torch.zeros_like(normed))
        return normed


@dataclass(frozen=True)
class PushVision(SteeringMethod):
    id: ClassVar[str] = "test-push-vision"

    def layers(self, family):
        return ()

    def vision_layers(self, family):
        return (0, 1)

    def edit_vision_mlp(self, outputs, layer, family):
        return outputs * (1.5 + layer)


@dataclass(frozen=True)
class Watch(Push):
    """Keeps what prepare and every context say, while pushing."""

    id: ClassVar[str] = "test-watch"

    seen: list = field(default_factory=list, compare=False)
    prepared: dict = field(default_factory=dict, compare=False)

    def prepare(self, prompt):
        self.prepared["with"] = prompt.passes.last_hidden(image=True)
        self.prepared["without"] = prompt.passes.last_hidden(image=False)
        self.prepared["first"] = prompt.passes.first_logits(image=True)

    def edit_mlp(self, inputs, outputs, context):
        self.seen.append(context)
        return super().edit_mlp(inputs, outputs, context)


def push(layer, inputs, outputs, row):
    return torch.stack([f + 0.2 * (1 + layer) * torch.tanh(x) for x, f in zip(inputs, outputs, strict=True)])


def naive_blend():
    states = {}

    def mix(normed):
        return normed + 0.3 * states[1] + 0.3 * states[2]

    return {"read": states.__setitem__, "norm": mix}


def generate(zoo, inputs, **settings):
    """New tokens and logits ``[B, steps, vocabulary]``."""
    out = zoo.model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def logits_of(zoo, inputs, **settings):
    with torch.no_grad():
        return zoo.model(**inputs, **settings).logits
