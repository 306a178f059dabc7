"""
AdaptVis: sharpen the look at the image where the model is sure of its answer, widen it where it is not.

The logits of image keys in the last row of the prompt, which gives the first token of the answer, are multiplied by a
weight: above 1 they concentrate on what the row looks at, below 1 they spread. ScalingVis takes one weight for all
prompts. AdaptVis reads the prompt once without edits, and chooses by the probability of the likeliest first token. That
first reading is a second prefill; generated rows are never edited.

Differs from the released code: positions are counted as usual, not from a prompt padded to 77 tokens; confidence is a
probability on every data set; text between two images is not scaled, only their tokens; the first reading ends with the
prompt, where the code generates the whole answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

    from lmmhooks.methods.prompt import PromptContext

__all__ = ["AdaptVis", "choose_weights", "confidence"]


def confidence(logits: Tensor) -> Tensor:
    """
    Probability of the likeliest token, rounded to two decimals as in the released code.

    Parameters
    ----------
    logits
        ``[B, vocabulary]`` float32.

    Returns
    -------
    Tensor
        ``[B]`` float32 in [0, 1].
    """
    return torch.softmax(logits, dim=-1).amax(dim=-1).round(decimals=2)


def choose_weights(sure: Tensor, threshold: float, low: float, high: float) -> Tensor:
    """``low`` where confidence ``sure [B]`` is below the threshold, ``high`` where it reaches it; ``[B]`` float32."""
    return torch.where(sure < threshold, low, high)


@dataclass(frozen=True)
class AdaptVis(AttentionMethod):
    """AdaptVis and, with `weight`, ScalingVis (see the module docstring)."""

    id: ClassVar[str] = "adaptvis"
    paper: ClassVar[str] = (
        "Why Is Spatial Reasoning Hard for VLMs? An Attention Mechanism Perspective on Focus Areas, 2503.01773"
    )
    code: ClassVar[str] = "https://github.com/shiqichen17/AdaptVis"
    rows: ClassVar[str] = "last"
    on_decode: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The two runs of the released script, on Controlled_Images_A with LLaVA-1.5-7B.
        "adapt_vis": {"low": 0.5, "high": 1.5, "threshold": 0.4},
        "scaling_vis": {"weight": 0.8},
        # Examples of the README.
        "readme": {"low": 0.5, "high": 1.2, "threshold": 0.3},
    }

    weight: float | None = setting(
        None,
        help="ScalingVis: weight on image logits of every prompt, at least 0; 1 changes nothing. Published: 0, 0.5, "
        "0.8, 1.2, 1.5, 2. None: AdaptVis, which chooses between `low` and `high`.",
    )
    low: float = setting(0.5, help="AdaptVis: weight of unsure prompts, at least 0. Published: 0.5 (script), 0.8.")
    high: float = setting(1.5, help="AdaptVis: weight of sure prompts, at least 0. Published: 1.2, 1.5 (script), 2.")
    threshold: float = setting(
        0.4,
        help="AdaptVis: least confidence of a sure prompt, rounded to 0.01, in [0, 1]. Script: 0.4, README: 0.3; "
        "tuned per data set on a fifth of it.",
    )

    def __post_init__(self) -> None:
        self._require(self.weight is None or 0.0 <= self.weight < math.inf, "weight", "at least 0 or None")
        self._require(0.0 <= self.low < math.inf, "low", "at least 0")
        self._require(0.0 <= self.high < math.inf, "high", "at least 0")
        self._require(0.0 <= self.threshold <= 1.0, "threshold", "in [0, 1]")

    @property
    def is_identity(self) -> bool:
        return (self.low == 1 and self.high == 1) if self.weight is None else self.weight == 1

    def prepare(self, prompt: PromptContext) -> None:
        if self.weight is None and prompt.layout.spans:
            sure = confidence(prompt.passes.first_logits())
            prompt.memory["weight"] = choose_weights(sure, self.threshold, self.low, self.high)

    def scale_keys(self, context: AttentionContext) -> Tensor | None:
        if not context.layout.spans:
            return None
        visual = context.layout.visual
        if self.weight is not None:
            return torch.where(visual, self.weight, 1.0)
        weight: Tensor = context.memory["weight"].to(visual.device)
        return torch.where(visual, weight[:, None], 1.0)
