"""
A model led along a given answer: what it would have said at every token, and where it looks.

The answer is forced on the model's own ``generate``, so that every kind of method acts as it does when the model
answers freely: branches are combined, tokens are reduced, caches are compressed. Two variants led along the same answer
can be compared token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lmmhooks.comparison.measures import entropy, mean_map, ranks, within_image
from lmmhooks.inspect.answer_rows import AnswerRow, AnswerRows
from lmmhooks.inspect.maps.measures import favouring, sinks_of
from lmmhooks.inspect.maps.result import SPANS
from lmmhooks.layout import Segment, VisualSpan
from lmmhooks.methods.words import token_texts

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.engines.state import PromptState

__all__ = ["Candidate", "Trace", "lead"]

NUM_CANDIDATES = 5


@dataclass(frozen=True)
class Candidate:
    """One of the most likely tokens of a step."""

    text: str
    probability: float


@dataclass(frozen=True, eq=False)
class Trace:
    """
    A variant along an answer of T tokens, in L decoder layers, over the V visual tokens of the prompt as given.

    Tensors are on the CPU. The end token belongs to the answer.

    Attributes
    ----------
    tokens
        Ids of the answer.
    texts
        The text each of them adds; empty for special tokens.
    logp
        ``[T]`` log-probability of each token, raw: before warpers and processors. -inf: ruled out.
    rank
        Long ``[T]``, 1 where the token is the one greedy decoding would choose.
    candidates
        The five most likely tokens of every step.
    shares
        ``[T, L, 4]`` attention on `SPANS`, mean over heads; sums to 1. NaN where a layer could not be read.
    visual
        ``[T, L, V]`` float32, raw attention on visual tokens, mean over heads; NaN for tokens that are not there.
    favoured
        ``[T, L, V]`` share of the heads that give a token more than 5 even shares; 0 for tokens that are not there.
    spans
        The images of the prompt as given, one after the other in the order of V.
    distribution
        ``[T, vocabulary]`` log-probabilities; None where they were not kept.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    logp: Tensor
    rank: Tensor
    candidates: tuple[tuple[Candidate, ...], ...]
    shares: Tensor
    visual: Tensor
    favoured: Tensor
    spans: tuple[VisualSpan, ...]
    distribution: Tensor | None

    @cached_property
    def images(self) -> Tensor:
        """Long ``[V]``: which image a visual token belongs to."""
        return torch.tensor([span.image for span in self.spans for _ in range(len(span))], dtype=torch.long)

    @cached_property
    def within(self) -> Tensor:
        """``[T, L, V]`` within-image rows: attention on the visual tokens of each image, divided by its sum."""
        out = torch.full_like(self.visual, torch.nan)
        for image in self.images.unique().tolist():
            mine = self.images == image
            out[..., mine] = within_image(self.visual[..., mine])
        return out

    @cached_property
    def maps(self) -> Tensor:
        """``[T, V]`` within-image attention, mean over layers; see `lmmhooks.comparison.measures.mean_map`."""
        return mean_map(self.within)

    @cached_property
    def entropy(self) -> Tensor:
        """``[T, L]`` entropy in nats of the attention on visual tokens, all images taken together."""
        return entropy(within_image(self.visual))

    @cached_property
    def present(self) -> Tensor:
        """Bool ``[L, V]``: tokens that entered a layer when the prompt was read."""
        return ~self.visual[0].isnan() if len(self.visual) else torch.zeros(self.visual.shape[1:], dtype=torch.bool)

    @cached_property
    def removed(self) -> Tensor:
        """Long ``[V]``: first layer that a token does not enter, L for tokens that stay."""
        layers = torch.arange(self.present.shape[0])[:, None].expand_as(self.present)
        return torch.where(self.present, layers + 1, 0).amax(dim=0) if len(layers) else layers.sum(dim=0)

    @cached_property
    def sinks(self) -> Tensor:
        """
        Bool ``[V]``: tokens above 5 even shares of the raw row in at least half of all pairs of layer and head.

        Counted over the steps of the answer; layers a token is absent from count as pairs that do not favour it.
        """
        if not self.favoured.numel():
            return torch.zeros(len(self.images), dtype=torch.bool)
        return sinks_of(self.favoured.mean(dim=(0, 1)), pairs=1)

    @property
    def sink_share(self) -> float:
        """Share of the attention on the image that falls on sinks, mean over tokens of the answer and layers."""
        if not bool(self.sinks.any()):
            return 0.0
        return float(within_image(self.visual)[..., self.sinks].nansum(dim=-1).mean())

    @property
    def visual_share(self) -> float:
        """Attention on visual tokens, mean over tokens of the answer, layers and heads."""
        return float(self.shares[..., SPANS.index("visual")].nanmean()) if self.shares.numel() else 0.0

    def chosen_otherwise(self) -> int | None:
        """First step at which greedy decoding would choose another token; None if there is none."""
        other = (self.rank > 1).nonzero().flatten()
        return int(other[0]) if len(other) else None


def lead(
    runtime: Runtime,
    inputs: dict[str, Any],
    tokens: Sequence[int],
    processor: Any,
    *,
    keep_distribution: bool = True,
) -> Trace:
    """
    Lead a wrapped model along an answer.

    Parameters
    ----------
    runtime
        Of the model; some patch that is no identity must be active.
    inputs
        One prompt.
    tokens
        The answer; at least one.
    processor
        Its tokenizer writes tokens.
    keep_distribution
        Whether to keep the probabilities of all tokens of the vocabulary.

    Raises
    ------
    LmmhooksError
        The methods on the model do not generate token by token.
    """
    rows = AnswerRows(runtime, _keep)
    model: Any = runtime.family.model
    forced = LogitsProcessorList([_Forced(tokens, int(inputs["input_ids"].shape[1]))])
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    with runtime.probing(rows.probes), torch.inference_mode():
        out = model.generate(
            **inputs,
            **greedy,
            max_new_tokens=len(tokens),
            logits_processor=forced,
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps, layout = rows.steps(), runtime.last_state.layout
    logp = torch.cat([step[:1] for step in out.logits]).float().log_softmax(dim=-1).cpu()
    targets = torch.tensor(list(tokens))
    num_visual = sum(map(len, layout.spans_of(0)))
    num_layers = runtime.family.num_layers
    kept = _stacked(steps, len(tokens), num_layers, num_visual)
    return Trace(
        tokens=tuple(tokens),
        texts=tuple(token_texts(processor.tokenizer, tokens)),
        logp=logp.gather(1, targets[:, None])[:, 0],
        rank=ranks(logp, targets),
        candidates=tuple(_candidates(row, processor.tokenizer) for row in logp),
        shares=kept[0],
        visual=kept[1],
        favoured=kept[2],
        spans=layout.spans_of(0),
        distribution=logp if keep_distribution else None,
    )


class _Forced(LogitsProcessor):
    """Leaves one token to choose from, whatever the model prefers."""

    def __init__(self, tokens: Sequence[int], length: int) -> None:
        self.tokens, self.length = list(tokens), length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self.tokens[input_ids.shape[1] - self.length]] = 0.0
        return only


def _keep(row: AnswerRow, state: PromptState) -> tuple[Tensor, Tensor, Tensor] | None:
    """Shares ``[4]``, raw visual row ``[V]`` and favouring heads ``[V]`` of a row."""
    if row.segment is None or row.position is None:
        return None
    mean = row.weights.mean(dim=0).cpu()
    shares = torch.zeros(len(Segment)).index_add_(0, row.segment, mean)[1:]
    seen = row.segment == Segment.VISUAL
    places = torch.cat([span.positions for span in state.layout.spans_of(0)] or [torch.empty(0, dtype=torch.long)])
    # Image after image: the tokens of one may stand between those of another.
    ordinal = torch.full((state.layout.length,), -1)
    ordinal[places] = torch.arange(len(places))
    ordinal = ordinal[row.position[seen]]
    visual = torch.full((len(places),), torch.nan)
    visual[ordinal] = mean[seen]
    num_heads, num_keys = row.weights.shape
    favoured = torch.zeros_like(visual)
    favoured[ordinal] = (favouring(row.weights, num_keys) / num_heads).cpu()[seen]
    return shares, visual, favoured


def _stacked(
    steps: Sequence[dict[int, tuple[Tensor, Tensor, Tensor] | None]], tokens: int, layers: int, visual: int
) -> tuple[Tensor, Tensor, Tensor]:
    shares = torch.full((tokens, layers, len(SPANS)), torch.nan)
    rows = torch.full((tokens, layers, visual), torch.nan)
    favoured = torch.zeros(tokens, layers, visual)
    for t, step in enumerate(steps):
        for layer, kept in step.items():
            if kept is not None:
                shares[t, layer], rows[t, layer], favoured[t, layer] = kept
    return shares, rows, favoured


def _candidates(logp: Tensor, tokenizer: Any) -> tuple[Candidate, ...]:
    top = logp.exp().topk(min(NUM_CANDIDATES, len(logp)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(Candidate(tokenizer.decode([token]), value) for token, value in pairs if value > 0)
