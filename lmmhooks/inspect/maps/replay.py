"""Reads a prompt again and goes on with tokens of the caller's choice, as ``generate`` would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lmmhooks.engines.runtime import find_runtime

__all__ = ["Replay", "frozen"]


class Replay:
    """Reads a batch of prompts and goes on with given tokens, one forward each, as ``generate`` does."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model = model
        self.inputs = inputs
        self.mask: Tensor = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        self.padded = not bool(self.mask.all())
        self.cache: Any = None

    def read(self) -> Tensor:
        """Read the prompts; logits ``[B, vocabulary]`` of their last positions."""
        runtime = find_runtime(self.model)
        assert runtime is not None, "the model is wrapped"
        cache = DynamicCache(config=runtime.family.text_config)
        return self._forward(**self.inputs, past_key_values=cache)

    def read_last_again(self) -> Tensor:
        """Take the last position of the prompts back and read it alone, now that all before it is in the cache."""
        self.mask = self.mask[:, :-1]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        return self._go_on(self.inputs["input_ids"][:, -1:])

    def step(self, token: int) -> Tensor:
        """Go on with a token in every row; logits ``[B, vocabulary]`` of what follows."""
        rows = self.mask.shape[0]
        return self._go_on(torch.full((rows, 1), token, device=self.mask.device))

    def detach(self) -> None:
        """Let go of the graph behind the cache."""
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def _go_on(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], dim=1)
        # As generate drops it: models with several axes of positions take the length of a mask for that of the step.
        mask = self.mask if self.padded else None
        return self._forward(input_ids=tokens, attention_mask=mask, past_key_values=self.cache)

    def _forward(self, **arguments: Any) -> Tensor:
        output = self.model(**arguments, use_cache=True, logits_to_keep=1, return_dict=True)
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that a graph begins where it is wanted and holds no more than that."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
