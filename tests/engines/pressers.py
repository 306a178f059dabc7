"""A compression that exists only in tests, its naive counterpart, and runs of prompts under one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.reduction.caching import CacheMethod
from tests.reference.caching import keep_each
from tests.zoo import IMAGE, VIDEO, Zoo

STEPS = 4
# float32 through four layers, batched against single rows; largest difference seen is 4e-6 on logits of about 3.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class ByValueNorm(CacheMethod):
    """Keeps values of largest norm, another share in every layer; norms of keys are all alike where keys are normed."""

    id: ClassVar[str] = "test-by-value-norm"

    shares: tuple[float, ...] = (0.5, 0.3, 0.8, 0.4)

    def num_keep(self, layers: Any) -> list[list[int]]:
        return [[int(self.shares[e.layer] * len(row)) for row in e.rows] for e in layers]

    def score(self, entries: Any, num_keep: Any) -> Tensor:
        return entries.values.norm(dim=-1)


@dataclass(frozen=True)
class ByValueNormLater(ByValueNorm):
    """The same, decided when all layers have run."""

    id: ClassVar[str] = "test-by-value-norm-later"
    needs_all_layers: ClassVar[bool] = True


def naive_by_value_norm(shares: tuple[float, ...]):
    def press(layer: int, weights: Tensor, keys: Tensor, values: Tensor):
        num = int(shares[layer] * keys.shape[1])
        norms = [[float(value.norm()) for value in head] for head in values]
        chosen = [sorted(sorted(range(len(row)), key=lambda j: -row[j])[:num]) for row in norms]
        return keep_each(chosen, keys, values)

    return press


def visual_of(one: dict[str, Any]) -> list[bool]:
    """Which tokens of a prompt that stands alone are visual."""
    return [token in (IMAGE, VIDEO) for token in one["input_ids"][0].tolist()]


def generate(zoo: Zoo, inputs: dict[str, Any], **kwargs: Any) -> tuple[Tensor, Tensor, list[int]]:
    """New tokens ``[B, t]``, their logits ``[B, t, vocabulary]``, and how many entries each layer ended with."""
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False} | kwargs
    out = zoo.model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1), lengths
