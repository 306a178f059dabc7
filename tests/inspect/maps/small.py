"""Passes over inputs of the zoo, whose models have no processor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmmhooks.inspect.maps.base import Question
from lmmhooks.inspect.maps.reading import Passes


class ZooPasses(Passes):
    """Every prompt is the same inputs."""

    def __init__(self, zoo: Any, given: dict[str, Tensor], processor: Any = None) -> None:
        super().__init__(zoo.model, processor, [], "")
        # Random weights end an answer anywhere.
        zoo.model.generation_config.eos_token_id = None
        self.given = given

    def inputs(self, prompt: str | None = None) -> dict[str, Any]:
        return dict(self.given)


def asked(
    passes: ZooPasses, *, rows: Any = None, layers: Any = None, heads: Any = None, tokens: int = 4, **how: Any
) -> Question:
    """A question about the first image, answered with a few tokens."""
    family = passes.runtime.family
    heads = tuple(range(family.num_heads)) if heads is None else tuple(heads)
    within = how.pop("within", False)
    geometry = how.pop("geometry", None)
    answered = passes.answer(0, tokens, heads, **how)
    rows = tuple(range(len(answered.new_ids))) if rows is None else tuple(rows)
    layers = tuple(range(family.num_layers)) if layers is None else tuple(layers)
    return Question(passes, answered, 0, geometry, rows, layers, heads, within)
