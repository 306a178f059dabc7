"""
Finding the channels in which attention sinks carry massive activations.

Thresholds after "Massive Activations in Large Language Models" (2402.17762) and VAR (2503.03321); anchors, persistence
and confirmation are our own procedure (UNVERIFIED). A threshold alone never decides: a channel must persist over layers
and prompts, be massive in absolute terms and relative to the median, and its score must go with received attention.
Channels that stand out only where the prompt has an image were not made by the decoder: they are kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from lmmhooks.engines.attention import AttentionEngine
from lmmhooks.engines.probes import DecoderProbe
from lmmhooks.methods.attention.sinks import sink_scores, sink_threshold
from lmmhooks.prompting import build_inputs

if TYPE_CHECKING:
    from lmmhooks.engines.runtime import Runtime
    from lmmhooks.family import Family

__all__ = ["SinkDims", "discover_sink_dims", "sink_channels"]

NUM_ANCHORS = 8
MAX_CHANNELS = 4
MIN_LAYER_SHARE = 0.5
MIN_PROMPT_SHARE = 0.8
MASSIVE = 100.0
MASSIVE_RATIO = 1000.0
RELAXED_RATIO = 100.0
"""Ratio to the median asked of channels that come with the image, which encoders write less extreme."""

QUESTIONS = (
    "What is in the image?",
    "Describe the picture in one sentence.",
    "Is there a dog in the image?",
    "How many people can you see?",
    "What colour is the largest object?",
    "List three things a traveller should pack for a week in the mountains.",
    "Explain why the sky looks blue during the day.",
    "Translate 'good morning' into French and German.",
)


@dataclass(frozen=True)
class SinkDims:
    """
    Result of the search.

    Attributes
    ----------
    dims
        Channels, strongest first; empty when the model has none.
    evidence
        JSON-compatible: candidates with their persistence, magnitude, ratio to the median and rank correlation.
    visual_dims
        Channels that stand out in prompts with an image only: what the vision encoder wrote and the decoder carries on.
        Empty where no image was shown.
    """

    dims: tuple[int, ...]
    evidence: dict[str, Any]
    visual_dims: tuple[int, ...] = ()


def sink_channels(hidden: Tensor, valid: Tensor, tau: float) -> dict[int, float]:
    """
    Channels that stand out at the anchors of one prompt and layer.

    Anchors are the first position and the `NUM_ANCHORS` positions with the largest normalised magnitude. A channel is a
    candidate when it exceeds ``tau`` (in units of the row's RMS) at the first position or at half of the anchors.

    Parameters
    ----------
    hidden
        ``[N, D]`` layer input.
    valid
        ``[N]`` bool.
    tau
        Threshold.

    Returns
    -------
    dict
        Channel to mean normalised magnitude over the anchors.
    """
    x = hidden[valid].float()
    z = x.abs() / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    strongest = z.amax(dim=-1).topk(min(NUM_ANCHORS, len(z))).indices
    anchors = z[torch.cat([strongest.new_zeros(1), strongest])]
    candidate = (z[0] >= tau) | ((anchors >= tau).float().mean(dim=0) >= 0.5)
    mean = anchors.mean(dim=0)
    return {int(c): float(mean[c]) for c in candidate.nonzero().flatten()}


@dataclass
class _Candidate:
    """What was seen of one channel."""

    channel: int
    layers_hit: list[int]
    """Per prompt, in how many layers it stood out."""
    z: list[float] = field(default_factory=list)
    peaks: list[tuple[float, float]] = field(default_factory=list)
    """Largest magnitude and its ratio to the median magnitude, per layer and prompt."""
    ranks: list[float] = field(default_factory=list)
    """Rank correlation of its score with received attention."""

    def look(self, hidden: Tensor, received: Tensor, prompt: int, z: float) -> None:
        x = hidden.float()
        peak = x[:, self.channel].abs().max()
        score = sink_scores(x, (self.channel,))
        self.layers_hit[prompt] += 1
        self.z.append(z)
        self.peaks.append((float(peak), float(peak / x.abs().median().clamp_min(1e-9))))
        rank = float(spearmanr(score.cpu().numpy(), received.cpu().numpy()).statistic)
        # Undefined where one of the two is constant; then it is no evidence.
        self.ranks.append(0.0 if math.isnan(rank) else rank)

    def summary(self, num_layers: int, with_image: Sequence[bool]) -> dict[str, Any]:
        magnitude, ratio = sorted(self.peaks)[len(self.peaks) // 2]
        lasting = [count >= MIN_LAYER_SHARE * num_layers for count in self.layers_hit]
        shown = [hit for hit, image in zip(lasting, with_image, strict=True) if image]
        unseen = [hit for hit, image in zip(lasting, with_image, strict=True) if not image]
        return {
            "channel": self.channel,
            "prompt_share": sum(lasting) / len(lasting),
            "image_share": sum(shown) / len(shown) if shown else None,
            "text_share": sum(unseen) / len(unseen) if unseen else None,
            "mean_z": sum(self.z) / len(self.z),
            "magnitude": magnitude,
            "ratio": ratio,
            "rank_correlation": sum(self.ranks) / len(self.ranks),
        }


def discover_sink_dims(runtime: Runtime, processor: Any = None, tau: float | None = None) -> SinkDims:
    """
    Search the channels of a model; costs one prefill per prompt of `QUESTIONS`.

    Parameters
    ----------
    runtime
        Of the model; its patches are suspended meanwhile.
    processor
        Builds prompts, every second one with a synthetic image, each time another. None: random token ids, text only.
    tau
        Threshold on normalised magnitude; None: 20, or 0.3125 sqrt(width) below width 2048.
    """
    family = runtime.family
    tau = tau if tau is not None else sink_threshold(family.hidden_size)
    # Deepstack layers still receive vision features: what stands out there is not the decoder's doing.
    layers = range(max(2, family.deepstack_layers), family.num_layers - 1)
    found: dict[int, _Candidate] = {}
    prompts = list(_prompts(family, processor))
    with_image = [image for _, image in prompts]
    for number, (inputs, _) in enumerate(prompts):
        hidden, received, valid = _read_prompt(runtime, inputs, layers)
        for layer in layers:
            for channel, z in sink_channels(hidden[layer], valid, tau).items():
                candidate = found.setdefault(channel, _Candidate(channel, [0] * len(prompts)))
                candidate.look(hidden[layer][valid], received[layer][valid], number, z)
    rows = sorted((c.summary(len(layers), with_image) for c in found.values()), key=lambda row: -row["mean_z"])
    least = 0.0 if (rescaled := _rescaled(family)) else MASSIVE
    # A share of 0.8 over prompts with several images also means: the same channels whatever the image.
    lasting = [row for row in rows if row["prompt_share"] >= MIN_PROMPT_SHARE][:MAX_CHANNELS]
    confirmed = [row for row in lasting if _confirmed(row, least, MASSIVE_RATIO)]
    propagated = [
        row
        for row in rows
        if row["image_share"] is not None and row["image_share"] >= MIN_PROMPT_SHARE and not row["text_share"]
    ]
    propagated = [row for row in propagated if _confirmed(row, 0.0, RELAXED_RATIO)][:MAX_CHANNELS]
    if confirmed:
        summary = f"{len(confirmed)} of {len(rows)} candidate channels are massive and attended to"
    elif rows:
        best = rows[0]
        summary = (
            f"strongest channel {best['channel']}: |x| {best['magnitude']:.0f}, {best['ratio']:.0f} times the median, "
            f"rank correlation {best['rank_correlation']:.2f}; needed: {least:.0f}, {MASSIVE_RATIO:.0f}, above 0"
        )
    else:
        summary = "no channel stands out"
    evidence = {"summary": summary, "tau": tau, "prompts": len(prompts), "images": sum(with_image)}
    evidence |= {"layers": list(layers), "ratios_only": rescaled, "candidates": rows[:16]}
    return SinkDims(_channels(confirmed), evidence, _channels(propagated))


def _confirmed(row: dict[str, Any], least: float, ratio: float) -> bool:
    return bool(row["magnitude"] >= least and row["ratio"] >= ratio and row["rank_correlation"] > 0)


def _channels(rows: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    return tuple(int(row["channel"]) for row in rows)


def _rescaled(family: Family) -> bool:
    """Whether embeddings are scaled, or branches or queries normed before they act: then only ratios mean something."""
    norms = ("q_norm", "post_feedforward_layernorm", "pre_feedforward_layernorm")
    layer = family.layers[0]
    scaled = hasattr(family.text_model.get_input_embeddings(), "embed_scale")
    return scaled or any(hasattr(part, name) for part in (layer, family.attention_of(layer)) for name in norms)


def _read_prompt(
    runtime: Runtime, inputs: dict[str, Any], layers: range
) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """Layer inputs ``[N, D]``, attention received per key ``[N]``, and valid positions of a single prompt."""
    hidden: dict[int, Tensor] = {}
    received: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def receive(weights: Tensor, real: Tensor) -> None:
            mass = (weights.mean(dim=1) * real[..., None]).sum(dim=1)[0]
            received[layer] = received[layer] + mass if layer in received else mass

        return receive

    def look(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            hidden[layer] = (args[0] if args else kwargs["hidden_states"])[0].detach()

        return hook

    with runtime.suspended() as attachments, torch.inference_mode():
        for layer in layers:
            attachments.pre_hook(runtime.family.layers[layer], look(layer), f"input of layer {layer}")
        AttentionEngine(runtime, [], [DecoderProbe(layer, "all", keep(layer)) for layer in layers]).attach(attachments)
        runtime.family.model(**inputs, use_cache=False)
        valid = runtime.last_state.layout.valid[0]
    seen = torch.arange(len(valid), 0, -1, device=valid.device)
    # Mean over the rows that can see a key, or early keys would win by number of rows alone.
    return hidden, {layer: mass / seen for layer, mass in received.items()}, valid


def _prompts(family: Any, processor: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """Inputs of every prompt, and whether there is an image in them."""
    device = family.text_model.device
    if processor is not None:
        for number, question in enumerate(QUESTIONS):
            images = [_image(number)] if number % 2 == 0 else []
            yield build_inputs(processor, images, question, device, family.text_model.dtype), bool(images)
        return
    generator = torch.Generator().manual_seed(0)
    bos = getattr(family.text_config, "bos_token_id", None)
    special = {family.image_token_id, family.video_token_id}
    for _ in QUESTIONS:
        ids = torch.randint(0, family.text_config.vocab_size, (1, 32), generator=generator)
        for token in special - {None}:
            ids[ids == token] = (token + 1) % family.text_config.vocab_size
        if isinstance(bos, int):
            ids[0, 0] = bos
        yield {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}, False


def _image(number: int) -> Image.Image:
    """A small synthetic picture: smooth colour ramps in four orientations."""
    ramp = Image.linear_gradient("L").rotate(90 * number).resize((224, 224))
    return Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
