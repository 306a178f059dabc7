"""
MemVR: when an early layer is unsure about the next token, show the image again through the next layer's MLP.

After each layer of a window the language head is asked for the next token. The first layer at which the entropy of its
ten best candidates is high injects the visual tokens into the MLP of the layer after it, as a key-value memory: keys
and values are both the visual embeddings, there is no softmax. The result is scaled to the size of the MLP's output and
blended with it, at all positions of that forward.

Differs from the released code, which sums entropies and takes means over a batch: every row triggers on its own and is
scaled by means over its own positions, which is the same for one row. The code also scales the memory by the mean
weight of the MLP's projections, which the scaling to the output's size cancels, so any MLP will do. The head is asked
at the last position only and no longer once a row has triggered. A row without an image is never touched; visual tokens
that a reduction removed are shown again. The window at depths other than 32 is UNVERIFIED.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from lmmhooks.methods.attention.steering import SteeringContext, SteeringMethod
from lmmhooks.methods.base import Method, setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.prompt import PromptContext

__all__ = ["Memvr", "retrace", "uncertainty"]

CANDIDATES = 10
"""Best tokens whose entropy counts (paper and code)."""


def uncertainty(logits: Tensor) -> Tensor:
    """
    Entropy of the ten best candidates, as a share of the largest possible.

    Parameters
    ----------
    logits
        ``[..., vocabulary]``; of a vocabulary below ten, all tokens are candidates.

    Returns
    -------
    Tensor
        ``[...]`` float32 in [0, 1].
    """
    best = logits.float().topk(min(CANDIDATES, logits.shape[-1]), dim=-1).values.log_softmax(dim=-1)
    return -(best.exp() * best).sum(dim=-1) / math.log(best.shape[-1])


def retrace(inputs: Tensor, outputs: Tensor, visual: Tensor, valid: Tensor, ratio: float) -> Tensor:
    """
    Blend what a memory of visual tokens answers into the output of an MLP.

    Parameters
    ----------
    inputs, outputs
        ``[R, N, D]`` of the MLP.
    visual
        ``[R, V, D]`` visual embeddings; rows of zeros are fillers and add nothing.
    valid
        ``[R, N]`` bool: positions that count for the means.
    ratio
        Share of the memory, in [0, 1].

    Returns
    -------
    Tensor
        ``[R, N, D]`` float32.
    """
    outputs, visual = outputs.float(), visual.float()
    recalled = inputs.float() @ visual.transpose(1, 2) @ visual
    size, wanted = ((states.abs().mean(dim=2) * valid).sum(dim=1) for states in (recalled, outputs))
    # Both sums run over the same positions, so that their ratio is the ratio of the means.
    scale = wanted / size.clamp(min=1e-12)
    return (1 - ratio) * outputs + ratio * scale[:, None, None] * recalled


@dataclass(frozen=True)
class Memvr(SteeringMethod):
    """Memory-space visual retracing (see the module docstring)."""

    id: ClassVar[str] = "memvr"
    paper: ClassVar[str] = (
        "Look Twice Before You Answer: Memory-Space Visual Retracing for Hallucination Mitigation in MLLMs, ICML 2025, "
        "2410.03577"
    )
    code: ClassVar[str] = "https://github.com/1zhou-Wang/MemVR"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "short-answers": {"ratio": 0.12},  # authors' scripts for MME and MM-Vet
        "long-answers": {"ratio": 0.28},  # for LLaVA-Bench, VizWiz and CHAIR: 0.28 to 0.32
    }

    ratio: float = setting(
        0.12,
        help="Share of the visual memory in the MLP output, in [0, 1]. LLaVA-1.5: 0.12 for MME and MM-Vet, 0.28 to "
        "0.32 for long answers; the released CHAIR script reads a ratio and uses 0.12.",
    )
    threshold: float = setting(
        0.75, help="Uncertainty in [0, 1] above which a layer triggers, at least 0; from 1 on none does. Paper: 0.75."
    )
    start: int | None = setting(
        None,
        help="Layers above this one may trigger, 0-based. None: 5 of 32 layers as for LLaVA-1.5 (9 for Qwen-VL-Chat "
        "and GLM-4V), in proportion at another depth (UNVERIFIED).",
    )
    end: int | None = setting(
        None,
        help="Layers below this one may trigger, 0-based; it is the last that can be injected into. None: 16 of 32 "
        "layers as published, in proportion at another depth (UNVERIFIED).",
    )
    images: Literal["last", "all"] = setting(
        "last", help="Whose tokens are shown again: of the 'last' image of a row as released, or of 'all' (UNVERIFIED)."
    )

    def __post_init__(self) -> None:
        self._require(0 <= self.ratio <= 1, "ratio", "in [0, 1]")
        self._require(self.threshold >= 0, "threshold", "at least 0")
        self._require(self.images in ("last", "all"), "images", "'last' or 'all'")
        self._require((self.start is None) == (self.end is None), "end", "given together with start, or neither")
        if self.start is not None and self.end is not None:
            self._require(self.start >= 0, "start", "at least 0")
            self._require(self.end >= self.start + 2, "end", "at least start + 2, so that a layer lies between them")

    def check(self, family: Any) -> None:
        depth = family.num_layers
        self._require(max(self.end or 0, 2) < depth, "end", f"at least 2 and below {depth}, the layers of this model")

    def bind(self, family: Any) -> Method:
        if self.start is not None:
            return self
        start = 5 * family.num_layers // 32
        return replace(self, start=start, end=max(16 * family.num_layers // 32, start + 2))

    @property
    def is_identity(self) -> bool:
        return self.ratio == 0 or self.threshold >= 1

    def read_layers(self, family: Any) -> Sequence[int]:
        return range(self._first, self._last + 1)

    def layers(self, family: Any) -> Sequence[int]:
        return range(self._first + 1, self._last + 2)

    @property
    def _first(self) -> int:
        """First layer that may trigger."""
        assert self.start is not None
        return self.start + 1

    @property
    def _last(self) -> int:
        assert self.end is not None
        return self.end - 1

    def prepare(self, prompt: PromptContext) -> None:
        shown = []
        for row, embeddings in enumerate(prompt.embeddings):
            spans = prompt.layout.spans_of(row)
            chosen = [span.positions for span in (spans if self.images == "all" else spans[-1:])]
            shown.append(embeddings[torch.cat(chosen).to(embeddings.device)] if chosen else embeddings[:0])
        prompt.memory["rows"] = [row for row, tokens in enumerate(shown) if len(tokens)]
        prompt.memory["visual"] = pad_sequence(shown, batch_first=True)

    def read_layer(self, hidden: Tensor, context: SteeringContext) -> None:
        memory = context.memory
        if context.layer == self._first:
            memory["waiting"] = memory["rows"]
        memory["triggered"] = []
        if memory["waiting"]:
            waiting = torch.tensor(memory["waiting"], device=hidden.device)
            doubt = uncertainty(context.logits(hidden[waiting, context.last.to(hidden.device)[waiting, 0]]))
            fired = (doubt > self.threshold).tolist()
            memory["triggered"] = [row for row, yes in zip(memory["waiting"], fired, strict=True) if yes]
            memory["waiting"] = [row for row, yes in zip(memory["waiting"], fired, strict=True) if not yes]

    def edit_mlp(self, inputs: Tensor, outputs: Tensor, context: SteeringContext) -> Tensor:
        if not context.memory["triggered"]:
            return outputs
        rows = torch.tensor(context.memory["triggered"], device=outputs.device)
        visual, valid = (states.to(outputs.device)[rows] for states in (context.memory["visual"], context.valid))
        edited = outputs.clone()
        edited[rows] = retrace(inputs[rows], outputs[rows], visual, valid, self.ratio).to(outputs.dtype)
        return edited
