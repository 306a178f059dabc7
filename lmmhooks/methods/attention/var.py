"""
Visual attention redistribution: take attention from sink tokens and give it to image tokens a head already looks at.

A few positions draw attention whatever is asked; they carry huge values in fixed channels of the hidden state. In heads
that look at the image, a fraction of the mass on those sinks goes to the visual non-sinks, in proportion to their
weight.

Differs from the released code, which keeps state between samples, edits the last layer and drops BOS: per-sample state,
last layer untouched, as in the paper. The paper's ``p`` (moved fraction) and ``rho`` (least non-sink share) are the
complements of the code's parameters of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn.functional import pad

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.attention.sinks import sink_scores, sink_threshold
from lmmhooks.methods.base import names_record, setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Var", "image_centric", "redistribute"]

#: Channels of massive activations by family, width and depth. Source: released code; for Qwen2-VL the paper.
SINK_DIMS: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("llava", 4096, 32): (1415, 2533),
    ("llava", 5120, 40): (2100, 4743),
    ("llava_next", 5120, 40): (2100, 4743),
    ("qwen2_vl", 3584, 28): (458, 2570),
}
#: Key heads of those decoders. Others of the same width and depth (Llama-3, Mistral) have channels of their own.
KEY_HEADS = {
    ("llava", 4096, 32): 32,
    ("llava", 5120, 40): 40,
    ("llava_next", 5120, 40): 40,
    ("qwen2_vl", 3584, 28): 4,
}


def image_centric(weights: Tensor, sinks: Tensor, visual: Tensor, rho: float, min_visual: float) -> Tensor:
    """
    Rows and heads that look at the image, and there mostly at what is no sink.

    Parameters
    ----------
    weights
        ``[B, H, R, N]`` attention rows.
    sinks, visual
        ``[B, N]`` bool.
    rho
        Least share of a row's visual mass that lies outside sinks.
    min_visual
        Least visual mass of a row.

    Returns
    -------
    Tensor
        ``[B, H, R, 1]`` bool.
    """
    is_visual = visual[:, None, None, :]
    mass_visual = (weights * is_visual).sum(dim=-1, keepdim=True)
    mass_sink = (weights * (is_visual & sinks[:, None, None, :])).sum(dim=-1, keepdim=True)
    # 1e-6 is added per visual key before summing, as released.
    share = mass_sink / (mass_visual + 1e-6 * is_visual.sum(dim=-1, keepdim=True)).clamp_min(1e-12)
    return (mass_visual >= min_visual) & (1 - share >= rho)


def redistribute(weights: Tensor, sinks: Tensor, visual: Tensor, p: float, rho: float, min_visual: float) -> Tensor:
    """
    Move a fraction of the attention on sinks to visual non-sinks, in rows and heads that look at the image.

    Parameters
    ----------
    weights
        ``[B, H, R, N]`` rows that sum to 1.
    sinks, visual
        ``[B, N]`` bool.
    p
        Fraction of the sink mass that moves.
    rho
        Least share of a row's visual mass that lies outside sinks.
    min_visual
        Least visual mass of a row.

    Returns
    -------
    Tensor
        Same shape; rows still sum to 1.
    """
    is_visual = visual[:, None, None, :]
    is_sink = sinks[:, None, None, :]
    target = is_visual & ~is_sink
    mass_target = (weights * target).sum(dim=-1, keepdim=True)
    mass_sink = (weights * is_sink).sum(dim=-1, keepdim=True)
    gate = image_centric(weights, sinks, visual, rho, min_visual) & (is_visual & is_sink).any(dim=-1, keepdim=True)
    # Without visual non-sinks there is nowhere to move mass to, and the row would no longer sum to 1.
    gate = gate & (mass_target >= 1e-6)
    gain = p * mass_sink / mass_target.clamp_min(1e-6)
    factor = 1.0 - p * is_sink + gain * target
    return weights * torch.where(gate, factor, 1.0)


@dataclass(frozen=True)
class Var(AttentionMethod):
    """Visual attention redistribution (see the module docstring)."""

    id: ClassVar[str] = "var"
    paper: ClassVar[str] = (
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models, ICLR 2025, 2503.03321"
    )
    code: ClassVar[str] = "https://github.com/seilk/VisAttnSink"
    calibrated: ClassVar[Mapping[str, Literal["wrap", "command"]]] = {"sink_dims": "wrap"}
    rows: ClassVar[str] = "after_image"
    observes: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"p": 0.6, "rho": 0.8},
        "hallucination": {"p": 0.6, "rho": 0.5},
        "vision-centric": {"p": 0.6, "rho": 0.9},
        # The shipped configuration keeps 0.6 of the sink mass and allows a sink share of 0.5.
        "released_yaml": {"p": 0.4, "rho": 0.5},
    }

    p: float = setting(0.6, help="Fraction of the sink mass that moves, in [0, 1]. Paper: 0.6 for all tasks.")
    rho: float = setting(
        0.8,
        help="Least visual non-sink share of a row, in [0, inf); above 1 nothing is edited. Paper: 0.8 general VQA, "
        "0.5 hallucination, 0.9 vision-centric.",
    )
    min_visual: float = setting(
        0.2, help="Least attention mass on the image for a row to be edited, in [0, 1] (`summ`)."
    )
    tau: float | None = setting(
        None, help="Sink threshold on the score. None: 20 (paper), or 0.3125 sqrt(width) below width 2048 (UNVERIFIED)."
    )
    sink_dims: tuple[int, ...] | str | None = setting(
        None,
        help="Channels of massive activations. None: published ones, else measured on this checkpoint; 'any': the "
        "largest channel of each position, for models without fixed ones (UNVERIFIED); 'FILE.json': a record of "
        "`lmmhooks calibrate var`.",
    )
    skip_layers: tuple[int, ...] = setting(
        (0, 1, -1), help="Layers left alone; negative counts from the end. Paper: 0, 1, last."
    )

    def __post_init__(self) -> None:
        self._require(0.0 <= self.p <= 1.0, "p", "in [0, 1]")
        self._require(self.rho >= 0.0, "rho", "at least 0")
        self._require(0.0 <= self.min_visual <= 1.0, "min_visual", "in [0, 1]")
        self._require(self.tau is None or self.tau > 0, "tau", "positive or None")
        if isinstance(self.sink_dims, str):
            named = self.sink_dims == "any" or names_record(self.sink_dims)
            self._require(named, "sink_dims", "channels, 'any', the path of a record (.json), or None")
        elif self.sink_dims is not None:
            object.__setattr__(self, "sink_dims", tuple(self.sink_dims))
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        key = (family.name, family.hidden_size, family.num_layers)
        return {"sink_dims": SINK_DIMS[key]} if KEY_HEADS.get(key) == family.num_kv_heads else {}

    def check(self, family: Any) -> None:
        if isinstance(self.sink_dims, tuple):
            inside = all(0 <= dim < family.hidden_size for dim in self.sink_dims) and self.sink_dims
            self._require(bool(inside), "sink_dims", f"channels in [0, {family.hidden_size}) of this model")
        outside = [layer for layer in self.skip_layers if not -family.num_layers <= layer < family.num_layers]
        self._require(not outside, "skip_layers", f"layers of this model, which has {family.num_layers}")

    @property
    def is_identity(self) -> bool:
        return self.p == 0 or self.rho > 1 or self.tau == math.inf

    def layers(self, family: Any) -> Sequence[int]:
        skipped = {layer % family.num_layers for layer in self.skip_layers}
        return [layer for layer in range(family.num_layers) if layer not in skipped]

    def threshold(self, width: int) -> float:
        """The sink threshold for a model of this width; scores never exceed ``sqrt(width)``."""
        return sink_threshold(width) if self.tau is None else self.tau

    def observe(self, hidden: Tensor, context: AttentionContext) -> None:
        # Bound to channels by the time a prompt is read, unless no fixed ones are wanted
        dims = self.sink_dims if isinstance(self.sink_dims, tuple) else None
        found = sink_scores(hidden, dims) > self.threshold(hidden.shape[-1])
        context.memory[context.layer] = found & context.layout.valid

    def edit_weights(self, weights: Tensor, context: AttentionContext) -> Tensor:
        sinks = context.memory[context.layer]
        # Sinks are found in the prompt and frozen; keys that came later are ordinary ones.
        sinks = pad(sinks, (0, context.layout.length - sinks.shape[1]))
        return redistribute(weights, sinks, context.layout.visual, self.p, self.rho, self.min_visual)
