"""What `lmmhooks.inspect.attention_map` returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lmmhooks.errors import PromptError
from lmmhooks.inspect.maps.words import Word, content_of, group_words, merge_words

if TYPE_CHECKING:
    from lmmhooks.geometry import Geometry

__all__ = ["SPANS", "AttentionMap", "MapToken"]

#: Parts of the sequence that attention is shared out among, in the order of `AttentionMap.span_shares`.
SPANS = ("system", "visual", "instruction", "generated")

#: Layers over which CARVE (2509.06461) averages entropy, whatever the depth of the model.
CARVE_LAYERS = range(20, 26)


@dataclass(frozen=True)
class MapToken:
    """
    A token of the answer.

    Attributes
    ----------
    index
        Its place in the answer, 0-based.
    id
        In the vocabulary.
    text
        What it adds to the text, spaces included; empty for special tokens.
    probability
        That the model gave it, before warpers and processors.
    rank
        1 for the most probable token of the step.
    """

    index: int
    id: int
    text: str
    probability: float
    rank: int


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """
    Where a model looks at an image while it answers: a value per token of the answer and visual token of the image.

    T tokens of the answer, the one that ends it included; L decoder layers; n visual tokens of the image. Row t belongs
    to the query whose output chooses token t: row 0 is the last position of the prompt, later ones the newest token
    (``flow`` traces token t itself). Tensors lie on the CPU.

    Attributes
    ----------
    kind, settings
        Kind of map and its settings.
    layers, heads
        That the map was made of, 0-based; empty where they have no meaning.
    normalise
        ``"share"``: as the kind defines its values, for ``raw`` the share of the whole row. ``"within"``: divided by
        their sum over the image.
    sink_filter
        What was done to sinks.
    prompt, answer
        The question, and the answer as text.
    answer_ids
        All tokens of the answer.
    tokens
        The T of them that the map is about.
    values
        float32 ``[T, n]``. NaN: a visual token that was removed before any of the layers could see it.
    span_shares
        float32 ``[T, L, 4]``: attention on `SPANS`, mean over heads, sums to 1; for all layers of the model.
    entropy
        float32 ``[T, L]``: entropy in nats of the within-image row, mean over heads taken first; see
        `relative_entropy`.
    kept
        Bool ``[L, n]``: whether a visual token is among the keys of a layer when the prompt is read.
    sinks
        Bool ``[n]``: visual tokens that receive more than 5 even shares of a row in at least half of all pairs of layer
        and head, over the rows that were read.
    sink_share
        Share of the attention on the image that falls on them, mean over rows and layers.
    geometry
        Where the visual tokens lie in the image.
    by_layer
        float32 ``[T, L', n]`` shares in each of ``layers``, mean over ``heads``; None for kinds that mix layers.
    by_head
        float16 ``[T, L', H', n]``; None unless they were to be kept.
    token_filter
        ``"content"``: `average` is over words that carry meaning; ``"none"``: over all tokens.
    """

    kind: str
    settings: dict[str, Any]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    normalise: Literal["share", "within"]
    sink_filter: Literal["none", "drop", "median"]
    prompt: str
    answer: str
    answer_ids: tuple[int, ...]
    tokens: tuple[MapToken, ...]
    values: Tensor
    span_shares: Tensor
    entropy: Tensor
    kept: Tensor
    sinks: Tensor
    sink_share: float
    geometry: Geometry
    by_layer: Tensor | None = field(default=None, repr=False)
    by_head: Tensor | None = field(default=None, repr=False)
    token_filter: Literal["content", "none"] = "content"

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """Words of the answer, made of the tokens the map is about; their places are rows of `values`."""
        return group_words([token.text for token in self.tokens])

    @property
    def word_values(self) -> Tensor:
        """``[words, n]``: mean over the tokens of each word."""
        return merge_words(self.values, self.words)

    @property
    def average(self) -> Tensor:
        """``[n]``: one map for the whole answer, the mean over the tokens that `token_filter` leaves."""
        rows = content_of(self.words, len(self.tokens)) if self.token_filter == "content" else range(len(self.tokens))
        return self.values[list(rows)].mean(dim=0)

    @property
    def relative_entropy(self) -> Tensor:
        """`entropy` divided by ln n: 1 where attention on the image is even."""
        n = self.values.shape[1]
        return self.entropy / math.log(n) if n > 1 else torch.zeros_like(self.entropy)

    def focus(self, layers: Sequence[int] = CARVE_LAYERS) -> float | None:
        """
        CARVE's scalar: entropy at the last row, mean over some layers, in nats; lower is more focused.

        The authors do not say whether the row is normalised first (UNVERIFIED); here it is. None if the model has none
        of the layers.
        """
        known = [layer for layer in layers if layer < self.entropy.shape[1]]
        return float(self.entropy[-1, known].mean()) if known and len(self.entropy) else None

    def plane(self, t: int | None = None, mode: Literal["bilinear", "nearest", "exact"] = "bilinear") -> Tensor:
        """
        A map painted onto the image.

        Parameters
        ----------
        t
            Row of `values`, negative ones from the end; None for `average`.
        mode
            See `lmmhooks.geometry.Geometry.plane`.

        Returns
        -------
        Tensor
            float64 ``[height, width]``; NaN where the model sees nothing.
        """
        return self.geometry.plane(self._row(t), mode)

    def grid(self, t: int | None = None) -> tuple[Tensor, tuple[float, float, float, float]]:
        """A map on the finest grid ``[rows, columns]``, and the part of the image that it covers; `t` as in `plane`."""
        return self.geometry.grid(self._row(t))

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values; NaN becomes None."""
        plain = ("kind", "settings", "normalise", "sink_filter", "prompt", "answer", "sink_share", "token_filter")
        return {
            **{name: getattr(self, name) for name in plain},
            "layers": list(self.layers),
            "heads": list(self.heads),
            "answer_ids": list(self.answer_ids),
            "tokens": [asdict(token) for token in self.tokens],
            "words": [asdict(word) for word in self.words],
            "values": _listed(self.values),
            "average": _listed(self.average),
            "by_layer": None if self.by_layer is None else _listed(self.by_layer),
            "spans": list(SPANS),
            "span_shares": _listed(self.span_shares),
            "entropy": _listed(self.entropy),
            "kept": self.kept.tolist(),
            "sinks": self.sinks.nonzero().flatten().tolist(),
            "size": list(self.geometry.size),
            "grids": [
                {"kind": grid.kind, "box": list(grid.box), "index": grid.index.tolist()} for grid in self.geometry.grids
            ],
        }

    def _row(self, t: int | None) -> Tensor:
        if t is None:
            return self.average
        if not -len(self.tokens) <= t < len(self.tokens):
            raise PromptError(f"t is {t}; this map has {len(self.tokens)} rows, 0 to {len(self.tokens) - 1}")
        return self.values[t]


def _listed(values: Tensor) -> Any:
    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, list) else None if math.isnan(value) else value

    return plain(values.tolist())
