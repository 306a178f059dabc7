"""
Multiply-adds and cache bytes of a decoder whose layers may each see a different number of tokens.

Six counts describe a layer during prefill (rows through the query, key/value, output and feed-forward projections,
query-key pairs, cache entries left behind). Every published way of saving visual computation is some choice of these
six, so one formula serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "DecoderShape",
    "LayerCounts",
    "Pairs",
    "attention_map_bytes",
    "decode_macs",
    "dense_counts",
    "kv_bytes",
    "layer_macs",
    "literature_macs",
    "prefill_macs",
    "score_macs",
]

Pairs = Literal["square", "causal"]
"""How query-key pairs of n causal tokens are counted: ``n**2`` (every paper) or ``n(n+1)/2`` (a fused kernel)."""

# Decoders whose feed-forward part is two matrices (up, down); all others of the supported range have a gate as well.
_UNGATED_TEXT_MODELS = frozenset({"bloom", "falcon", "gpt2", "gpt_neox", "mpt", "opt", "phi", "starcoder2"})


def _first(config: Any, *names: str) -> Any:
    """Return the first attribute that exists and is set; families name the same size differently."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ValueError(
        f"{type(config).__name__} has none of {', '.join(names)}: pass the text config of the model, "
        "or construct DecoderShape(...) from the sizes directly"
    )


@dataclass(frozen=True)
class DecoderShape:
    """
    Sizes of a decoder that its cost depends on.

    Parameters
    ----------
    layers
        Number of decoder layers.
    width
        Width of the hidden states.
    kv_width
        Width of all key heads together: number of key/value heads times head width. Smaller than `query_width` under
        grouped-query attention.
    ffn_width
        Inner width of the feed-forward part.
    vocabulary
        Rows of the output embedding.
    query_width
        Width of all query heads together. 0 (default) means equal to `width`, which holds for most families
        (an exception: Qwen3, whose head width is set apart).
    gated_ffn
        Whether the feed-forward part has three matrices (gate, up, down) or two.

    Raises
    ------
    ValueError
        A size that is not positive.
    """

    layers: int
    width: int
    kv_width: int
    ffn_width: int
    vocabulary: int
    query_width: int = 0
    gated_ffn: bool = True

    def __post_init__(self) -> None:
        if self.query_width == 0:
            object.__setattr__(self, "query_width", self.width)
        for name in ("layers", "width", "kv_width", "ffn_width", "vocabulary", "query_width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"DecoderShape.{name} is {getattr(self, name)}: it has to be positive")

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """
        Read the sizes from a transformers text config.

        Sliding attention windows are not modelled: a prompt longer than the window is overestimated.

        Parameters
        ----------
        config
            The text config, or a multimodal config that has one (``get_text_config()`` is asked if it exists).

        Returns
        -------
        DecoderShape

        Raises
        ------
        ValueError
            A size is missing; or the decoder mixes experts, whose active width the config alone does not settle;
            or it has linear-attention layers, which have no query-key pairs to count.
        """
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        if getattr(config, "num_experts_per_tok", None):
            raise ValueError(
                f"{type(config).__name__} is a mixture of experts: construct DecoderShape(...) with "
                "ffn_width = experts per token x width of one expert"
            )
        if "linear_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError(
                f"{type(config).__name__} has linear-attention layers: the cost model covers softmax attention only"
            )
        heads = _first(config, "num_attention_heads", "n_head")
        width = _first(config, "hidden_size", "n_embd")
        head_width = getattr(config, "head_dim", None) or width // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            layers=_first(config, "num_hidden_layers", "n_layer"),
            width=width,
            kv_width=kv_heads * head_width,
            ffn_width=_first(config, "intermediate_size", "ffn_dim", "n_inner"),
            vocabulary=_first(config, "vocab_size"),
            query_width=heads * head_width,
            gated_ffn=getattr(config, "model_type", "") not in _UNGATED_TEXT_MODELS,
        )

    @property
    def ffn_macs_per_token(self) -> int:
        """MACs of one token in one feed-forward part."""
        return (3 if self.gated_ffn else 2) * self.width * self.ffn_width

    @property
    def linear_macs_per_token(self) -> int:
        """MACs of one token in one layer, attention pairs not included; also the layer's weights."""
        projections = 2 * self.width * self.query_width + 2 * self.width * self.kv_width
        return projections + self.ffn_macs_per_token

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Cache bytes that one token leaves in all layers together (keys and values)."""
        return self.layers * 2 * self.kv_width * bytes_per_element


@dataclass(frozen=True)
class LayerCounts:
    """
    What one layer does with a prompt: the six counts of the cost model.

    Parameters
    ----------
    query_rows, kv_rows, output_rows, ffn_rows
        Tokens that pass the query, the key and value, the output projection and the feed-forward part.
    pairs
        Query-key pairs scored. A float, because a density may scale it.
    cache
        Entries per key/value head that remain in the cache after the prefill.
    """

    query_rows: int
    kv_rows: int
    output_rows: int
    ffn_rows: int
    pairs: float
    cache: int

    @classmethod
    def dense(cls, tokens: int, pairs: Pairs = "square") -> LayerCounts:
        """Count a normal layer with `tokens` tokens; also a layer before which the others were dropped."""
        return cls(tokens, tokens, tokens, tokens, _causal_pairs(tokens, pairs), tokens)

    @classmethod
    def deleting(cls, tokens: int, deleted: int, pairs: Pairs = "square") -> LayerCounts:
        """Count a layer that drops `deleted` tokens after its attention, before its output projection (FitPrune)."""
        left = tokens - deleted
        return cls(tokens, tokens, left, left, _causal_pairs(tokens, pairs), tokens)

    @classmethod
    def frozen_visual(cls, text: int, visual: int, prefix: int = 0, pairs: Pairs = "square") -> LayerCounts:
        """Count a layer in which visual tokens serve only as keys and values (ShortV; NAAViT ``frozen``)."""
        scored = _text_query_pairs(text, visual, prefix, pairs)
        return cls(text, text + visual, text, text, scored, text + visual)

    @classmethod
    def without_visual_pairs(
        cls, text: int, visual: int, prefix: int, see_self: bool = False, pairs: Pairs = "square"
    ) -> LayerCounts:
        """Count a layer whose visual queries see the `prefix` text tokens before them and maybe themselves (NAAViT)."""
        tokens = text + visual
        scored = _text_query_pairs(text, visual, prefix, pairs) + visual * prefix + (visual if see_self else 0)
        return cls(tokens, tokens, tokens, tokens, scored, tokens)

    @classmethod
    def neighbourhood(cls, text: int, visual: int, visual_pairs: int, pairs: Pairs = "square") -> LayerCounts:
        """Count a layer whose visual queries score `visual_pairs` visual keys in all, neighbours on the grid (YOPO)."""
        tokens = text + visual
        scored = _causal_pairs(tokens, pairs) - _causal_pairs(visual, pairs) + visual_pairs
        return cls(tokens, tokens, tokens, tokens, scored, tokens)

    @classmethod
    def block_sparse(cls, tokens: int, density: float, pairs: Pairs = "square") -> LayerCounts:
        """Count a layer that scores a share `density` in (0, 1] of the pairs (sparse prefill)."""
        return cls(tokens, tokens, tokens, tokens, density * _causal_pairs(tokens, pairs), tokens)

    @classmethod
    def compressed_cache(cls, tokens: int, cache: int, pairs: Pairs = "square") -> LayerCounts:
        """Count a normal layer whose cache is cut to `cache` entries after the prefill (KV compression)."""
        return cls(tokens, tokens, tokens, tokens, _causal_pairs(tokens, pairs), cache)


def _causal_pairs(tokens: int, pairs: Pairs) -> float:
    if pairs == "square":
        return tokens * tokens
    if pairs == "causal":
        return tokens * (tokens + 1) / 2
    raise ValueError(f"pairs is {pairs!r}: use 'square' or 'causal'")


def _text_query_pairs(text: int, visual: int, prefix: int, pairs: Pairs) -> float:
    """Pairs of the text queries: all keys under `square`; causal text plus, after the image, every visual key."""
    if pairs == "square":
        return text * (text + visual)
    return _causal_pairs(text, pairs) + (text - prefix) * visual


def dense_counts(text: int, visual_per_layer: Sequence[int], pairs: Pairs = "square") -> list[LayerCounts]:
    """
    Counts of a decoder whose layers are all normal, with the visual tokens of each layer given.

    Parameters
    ----------
    text
        Text tokens, present in every layer.
    visual_per_layer
        Visual tokens that enter each layer (see :func:`lmmhooks.cost.visual_schedule`).
    pairs
        How query-key pairs are counted.

    Returns
    -------
    list of LayerCounts
        One per layer.
    """
    return [LayerCounts.dense(text + visual, pairs) for visual in visual_per_layer]


def layer_macs(shape: DecoderShape, counts: LayerCounts) -> float:
    """MACs of one layer during prefill."""
    return (
        counts.query_rows * shape.width * shape.query_width
        + counts.kv_rows * 2 * shape.width * shape.kv_width
        + counts.output_rows * shape.query_width * shape.width
        + counts.ffn_rows * shape.ffn_macs_per_token
        + 2 * shape.query_width * counts.pairs
    )


def prefill_macs(shape: DecoderShape, counts: Iterable[LayerCounts], lm_head: bool = False) -> float:
    """
    MACs of the decoder during prefill.

    Parameters
    ----------
    shape
        The decoder.
    counts
        One entry per layer.
    lm_head
        Whether to add the output embedding for the last position. Papers leave it out, hence the default.

    Returns
    -------
    float
        Multiply-adds; FLOPs are twice this.
    """
    return sum(layer_macs(shape, layer) for layer in counts) + (shape.width * shape.vocabulary if lm_head else 0)


def kv_bytes(shape: DecoderShape, counts: Iterable[LayerCounts], bytes_per_element: int = 2) -> int:
    """Cache bytes of one sequence after the prefill: keys and values of every layer's own length."""
    return sum(layer.cache for layer in counts) * 2 * shape.kv_width * bytes_per_element


def decode_macs(shape: DecoderShape, cache_entries: Sequence[int], step: int = 0) -> int:
    """
    MACs of one decode step of one sequence, output embedding included.

    Parameters
    ----------
    shape
        The decoder.
    cache_entries
        Entries that the prefill left in each layer's cache.
    step
        Tokens generated before this one (0-based step), which lengthen every layer's cache alike.

    Returns
    -------
    int
        Multiply-adds. As in the papers, the new token's score with itself is not counted.
    """
    pairs = sum(entries + step for entries in cache_entries)
    linear = len(cache_entries) * shape.linear_macs_per_token
    return linear + 2 * shape.query_width * pairs + shape.width * shape.vocabulary


def score_macs(shape: DecoderShape, tokens: int, rows: int = 1, recompute_keys: bool = False) -> int:
    """
    MACs of scoring tokens by explicit attention rows of one layer, beside the fused attention.

    Parameters
    ----------
    shape
        The decoder.
    tokens
        Keys that each row scores.
    rows
        Query rows that are recomputed.
    recompute_keys
        Whether the keys are projected again instead of being read from the cache.

    Returns
    -------
    int
        Multiply-adds.
    """
    query = rows * shape.width * shape.query_width
    keys = tokens * shape.width * shape.kv_width if recompute_keys else 0
    return query + keys + rows * tokens * shape.query_width


def attention_map_bytes(heads: int, tokens: int, batch: int = 1, bytes_per_element: int = 4) -> int:
    """Bytes of one layer's full attention matrix, which row-wise scores avoid."""
    return batch * heads * tokens * tokens * bytes_per_element


def literature_macs(shape: DecoderShape, visual_per_layer: Iterable[int], ffn_matrices: int = 3) -> int:
    """
    The formula of the pruning papers: visual tokens only, multi-head attention, square pairs.

    ``sum_l (4 V_l d^2 + 2 V_l^2 d + 3 V_l d m)``. PyramidDrop and VScan label this number FLOPs although it counts
    multiply-adds; CDPruner and FasterVLM print twice this. It overstates decoders with grouped-query attention.

    Parameters
    ----------
    shape
        The decoder; `width` and `ffn_width` are used.
    visual_per_layer
        Visual tokens entering each layer.
    ffn_matrices
        3 for a gated feed-forward part; 2 reproduces FastV's own text.

    Returns
    -------
    int
        Multiply-adds.
    """
    width, ffn_width = shape.width, shape.ffn_width
    return sum(
        4 * visual * width**2 + 2 * visual**2 * width + ffn_matrices * visual * width * ffn_width
        for visual in visual_per_layer
    )
