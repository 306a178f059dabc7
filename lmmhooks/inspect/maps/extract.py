"""Attention maps of one answer: `attention_map` reads it once and lets a kind of map make values of what was read."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lmmhooks.errors import MethodError, PromptError, closest
from lmmhooks.geometry import geometry_of
from lmmhooks.inspect.maps.base import MapKind, Question
from lmmhooks.inspect.maps.flow import Flow
from lmmhooks.inspect.maps.gradient import Gradient
from lmmhooks.inspect.maps.measures import sinks_of, within_image
from lmmhooks.inspect.maps.occlusion import Occlusion
from lmmhooks.inspect.maps.raw import Raw
from lmmhooks.inspect.maps.reading import Answered, Passes, watching
from lmmhooks.inspect.maps.relative import Relative
from lmmhooks.inspect.maps.relevancy import Relevancy
from lmmhooks.inspect.maps.result import AttentionMap, MapToken
from lmmhooks.inspect.maps.rollout import Rollout
from lmmhooks.inspect.maps.tam import Tam
from lmmhooks.methods.refinement.filters import without
from lmmhooks.methods.refinement.saliency import Saliency
from lmmhooks.methods.words import token_texts
from lmmhooks.prompting import as_images, open_image

if TYPE_CHECKING:
    from lmmhooks.geometry import Geometry

__all__ = ["KINDS", "attention_map"]

KINDS: dict[str, type[MapKind]] = {
    kind.id: kind for kind in (Raw, Relative, Gradient, Relevancy, Rollout, Flow, Tam, Occlusion)
}


def attention_map(
    model: nn.Module,
    processor: Any,
    image: Any,
    prompt: str,
    *,
    kind: str = "raw",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    neutral_prompt: str | None = None,
    normalise: Literal["share", "within"] = "share",
    token_filter: Literal["content", "none"] = "content",
    sink_filter: Literal["none", "drop", "median"] = "none",
    max_new_tokens: int = 64,
    image_index: int = 0,
    keep_heads: bool = False,
    **settings: Any,
) -> AttentionMap:
    """
    Answer a question greedily, and map where the model looks for every token of the answer.

    The model computes what it always does, with its own attention backend; a few rows are computed once more beside it.
    On a wrapped model the methods act, and rows are read after their edits.

    Parameters
    ----------
    model
        A transformers image-text-to-text model, wrapped or not.
    processor
        Its processor.
    image
        A PIL image, a path, or several.
    prompt
        The question; the chat template of the processor is applied.
    kind
        ``"raw"``: attention. ``"relative"``: over that of a neutral prompt. ``"grad"``: times its gradient, for one
        token's backward pass per token. ``"relevancy"``: the same carried through all layers. ``"rollout"``,
        ``"flow"``: products over layers. ``"tam"``: what positions would say, without attention; the most readable.
        ``"occlusion"``: what hiding parts of the image does. Relevancy, rollout and flow take up to 1500 positions.
    layers
        Decoder layers, 0-based; None: all, for ``"grad"`` that of the released code or the middle one.
    heads
        Query heads, 0-based; None: all.
    tokens
        Places of the tokens of the answer that are mapped, negative ones from the end; None: all.
    neutral_prompt
        For ``"relative"``; None: "Write a general description of the image."
    normalise
        ``"share"``: values as the kind defines them. ``"within"``: within the image, where they sum to 1; ``"raw"`` and
        ``"relative"`` restrict the row of every head before the mean is taken.
    token_filter
        `AttentionMap.average` is over words that carry meaning, or over all tokens.
    sink_filter
        ``"drop"``: sinks get 0, the others are scaled so that the sum stays. ``"median"``: they get the median of the
        cells around them.
    max_new_tokens
        Tokens of the answer at most.
    image_index
        Which of several images is mapped, 0-based.
    keep_heads
        Keep rows of every head in `AttentionMap.by_head`: 2 bytes per token, layer, head and visual token.
    **settings
        Of the kind: ``epsilon`` (relative), ``rescale`` (relevancy), ``regularise`` (flow), ``official``, ``window``
        (tam), ``block``, ``fill``, ``batch`` (occlusion).

    Returns
    -------
    AttentionMap

    Raises
    ------
    MethodError
        An unknown kind or setting, or a value out of range.
    PromptError
        No image, an image whose cells are not known, or a prompt too long for the kind.
    """
    made = _kind(kind, neutral_prompt, settings)
    _choose("normalise", normalise, ("share", "within"))
    _choose("token_filter", token_filter, ("content", "none"))
    _choose("sink_filter", sink_filter, ("none", "drop", "median"))
    if not made.uses_layers and not (layers is None and heads is None):
        raise MethodError(f"kind {kind!r} reads no attention, so layers and heads have no meaning; leave them out")
    opened = [open_image(one) for one in as_images(image)]
    if not 0 <= image_index < len(opened):
        given = f"{len(opened)} images were given" if opened else "no image was given"
        raise PromptError(f"image number {image_index} is to be mapped, but {given}; a map needs an image to lie on")
    with watching(model, processor):
        passes = Passes(model, processor, opened, prompt)
        family = passes.runtime.family
        all_layers, all_heads = range(family.num_layers), range(family.num_heads)
        chosen_layers = _chosen("layers", layers, family.num_layers, made.default_layers(family))
        chosen_heads = _chosen("heads", heads, family.num_heads, all_heads)
        answered = passes.answer(
            image_index, max_new_tokens, chosen_heads, keep_heads=keep_heads, states=made.reads_states
        )
        geometry = geometry_of(family, answered.span, opened[image_index].size, processor)
        rows = _rows(tokens, len(answered.new_ids))
        question = Question(
            passes, answered, image_index, geometry, rows, chosen_layers, chosen_heads, normalise == "within"
        )
        values = made.values(question)
    read = {name: answered.stacked(name, len(all_layers)) for name in ("spans", "entropy", "mean", "favoured", "share")}
    pairs = sum(len(step) for step in answered.rows) * len(all_heads)
    sinks = sinks_of(read["favoured"].nansum(dim=(0, 1)), pairs)
    values = _filtered(values, sinks, sink_filter, geometry)
    picked = list(rows)
    return AttentionMap(
        kind=kind,
        settings=made.settings(),
        layers=chosen_layers if made.uses_layers else (),
        heads=chosen_heads if made.uses_layers else (),
        normalise=normalise,
        sink_filter=sink_filter,
        prompt=prompt,
        answer=processor.tokenizer.decode(list(answered.new_ids), skip_special_tokens=True).strip(),
        answer_ids=answered.new_ids,
        tokens=_tokens(answered, rows, processor.tokenizer),
        values=within_image(values) if normalise == "within" else values,
        span_shares=read["spans"][picked],
        entropy=read["entropy"][picked],
        kept=~read["share"][0].isnan(),
        sinks=sinks,
        sink_share=_sink_share(read["mean"], sinks),
        geometry=geometry,
        by_layer=read["share"][picked][:, list(chosen_layers)] if kind == "raw" else None,
        by_head=_by_head(answered, rows, chosen_layers) if keep_heads else None,
        token_filter=token_filter,
    )


def _kind(kind: str, neutral_prompt: str | None, settings: dict[str, Any]) -> MapKind:
    if kind not in KINDS:
        raise MethodError(f"no map is of kind {kind!r}{closest(kind, KINDS)}; there are: {', '.join(KINDS)}")
    given = dict(settings)
    if neutral_prompt is not None:
        given["neutral_prompt"] = neutral_prompt
    known = [item.name for item in fields(KINDS[kind])]
    for name in given:
        if name not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has none"
            raise MethodError(f"kind {kind!r} has no setting {name!r}{closest(name, known)}; {has}")
    return KINDS[kind](**given)


def _choose(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise MethodError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def _chosen(name: str, given: int | Sequence[int] | None, number: int, default: Sequence[int]) -> tuple[int, ...]:
    """Some layers or heads, ascending."""
    if given is None:
        return tuple(default)
    wanted = [given] if isinstance(given, int) else list(given)
    if not wanted or not all(isinstance(one, int) and 0 <= one < number for one in wanted):
        raise MethodError(f"{name} is {given!r}; give one or more numbers from 0 to {number - 1}")
    return tuple(sorted(set(wanted)))


def _rows(tokens: Sequence[int] | None, number: int) -> tuple[int, ...]:
    if tokens is None:
        return tuple(range(number))
    wanted = [operator.index(one) for one in tokens]
    if not wanted or not all(-number <= one < number for one in wanted):
        raise MethodError(f"tokens is {list(tokens)}; the answer has {number} tokens, 0 to {number - 1}")
    return tuple(sorted({one % number for one in wanted}))


def _filtered(values: Tensor, sinks: Tensor, how: str, geometry: Geometry) -> Tensor:
    if how == "none" or not bool(sinks.any()):
        return values
    cleaned = []
    for row in values:
        gone = row.isnan()
        # Tokens that were removed are no neighbours of sinks, and stay without a value.
        filled = without(Saliency(row, geometry), sinks | gone, how).values.float()
        cleaned.append(filled.masked_fill(gone, torch.nan))
    return torch.stack(cleaned)


def _tokens(answered: Answered, rows: Sequence[int], tokenizer: Any) -> tuple[MapToken, ...]:
    texts = token_texts(tokenizer, answered.new_ids)
    return tuple(
        MapToken(t, answered.new_ids[t], texts[t], float(answered.probabilities[t]), int(answered.ranks[t]))
        for t in rows
    )


def _sink_share(mean: Tensor, sinks: Tensor) -> float:
    """Of the attention on the image, mean over rows and layers."""
    if not bool(sinks.any()):
        return 0.0
    return float(within_image(mean)[..., sinks].nansum(dim=-1).mean())


def _by_head(answered: Answered, rows: Sequence[int], layers: Sequence[int]) -> Tensor:
    known = next(row.by_head for step in answered.rows for row in step.values() if row.by_head is not None)
    missing = torch.full_like(known, torch.nan)
    out = []
    for t in rows:
        step = [answered.rows[t].get(layer) for layer in layers]
        out.append(torch.stack([missing if row is None or row.by_head is None else row.by_head for row in step]))
    return torch.stack(out)
