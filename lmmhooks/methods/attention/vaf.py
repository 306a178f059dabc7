"""
Visual amplification fusion: in the middle layers, where image and text fuse, text rows look harder at the image.

Logits of image keys are multiplied by a factor above 1, those of the system prompt by one below 1, in the text rows
after the image and in generated rows. A factor sharpens: it strengthens positive logits and weakens negative ones.

Differs from the released code, which knows only the prompt of LLaVA-1.5: spans are those of each prompt (with several
images, all of them and the text before the first), and a short prompt does not count as a decode step. The paper edits
only heads that look at the image, the code all of them: all is the default, `head_fraction` the other. Its value, and
that heads are ranked once per prompt by the last row, are UNVERIFIED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lmmhooks.methods.attention.base import AttentionContext, AttentionMethod
from lmmhooks.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Vaf", "key_factors", "looking_heads"]


def key_factors(visual: Tensor, system: Tensor, enh: float, sup: float) -> Tensor:
    """
    Factor on the logits of every key.

    Parameters
    ----------
    visual, system
        ``[B, N]`` bool.
    enh, sup
        Factors of the two segments.

    Returns
    -------
    Tensor
        ``[B, N]`` float32.
    """
    factors = torch.ones(visual.shape, device=visual.device)
    return factors.masked_fill_(visual, enh).masked_fill_(system, sup)


def looking_heads(weights: Tensor, visual: Tensor, num_heads: int) -> Tensor:
    """
    The heads with the most attention on the image.

    Parameters
    ----------
    weights
        ``[B, H, N]`` attention of one row.
    visual
        ``[B, N]`` bool.
    num_heads
        How many heads to choose, in [1, H].

    Returns
    -------
    Tensor
        ``[B, H]`` bool.
    """
    mass = (weights * visual[:, None]).sum(dim=-1)
    best = mass.topk(num_heads, dim=1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, best, True)


@dataclass(frozen=True)
class Vaf(AttentionMethod):
    """Visual amplification fusion (see the module docstring)."""

    id: ClassVar[str] = "vaf"
    paper: ClassVar[str] = (
        "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language "
        "Models, CVPR 2025, 2503.13107"
    )
    code: ClassVar[str] = "https://github.com/ustc-hyin/ClearSight"
    rows: ClassVar[str] = "after_image"

    enh: float = setting(1.15, help="Factor on logits of image keys, at least 0; 1 leaves them. Released script: 1.15.")
    sup: float = setting(
        0.95, help="Factor on logits of system prompt keys, at least 0; 1 leaves them. Released script: 0.95."
    )
    start: int | None = setting(
        None, help="First edited layer, 0-based. None: 9 of 32 layers as released, other depths in proportion."
    )
    end: int | None = setting(
        None, help="One past the last edited layer. None: 15 of 32 layers as released, other depths in proportion."
    )
    head_fraction: float = setting(
        1.0,
        help="Fraction of heads that is edited, in (0, 1]: those with the most attention on the image in the last row "
        "of the prompt. Released code: 1; the paper's restriction is about 0.5 (UNVERIFIED).",
    )

    def __post_init__(self) -> None:
        self._require(0.0 <= self.enh < math.inf, "enh", "at least 0")
        self._require(0.0 <= self.sup < math.inf, "sup", "at least 0")
        self._require(self.start is None or self.start >= 0, "start", "at least 0 or None")
        self._require(self.end is None or self.end >= 1, "end", "at least 1 or None")
        self._require(0.0 < self.head_fraction <= 1.0, "head_fraction", "in (0, 1]")

    def check(self, family: Any) -> None:
        bound = self.bind(family)
        start, end = self.span(family)
        bound._require(end <= family.num_layers, "end", f"at most {family.num_layers}, the layers of this model")
        bound._require(start < end, "start", f"below end={end}")
        some = int(self.head_fraction * family.num_heads) > 0
        self._require(some, "head_fraction", f"at least 1/{family.num_heads}: this model has {family.num_heads} heads")

    def bind(self, family: Any) -> Vaf:
        start, end = self.span(family)
        return replace(self, start=start, end=end)

    def span(self, family: Any) -> tuple[int, int]:
        """First edited layer and one past the last: 9 to 14 of 32 where not given, other depths in proportion."""
        start = round(family.num_layers * 9 / 32) if self.start is None else self.start
        end = round(family.num_layers * 14 / 32) + 1 if self.end is None else self.end
        return start, end

    @property
    def is_identity(self) -> bool:
        return self.enh == 1 and self.sup == 1

    def layers(self, family: Any) -> Sequence[int]:
        return range(*self.span(family))

    def scale_keys(self, context: AttentionContext) -> Tensor | None:
        layout = context.layout
        factors = key_factors(layout.visual, layout.system, self.enh, self.sup)
        if self.head_fraction == 1:
            return factors
        if context.is_prefill and context.layer not in context.memory:
            last = layout.last.int().argmax(dim=1, keepdim=True)
            num_heads = int(self.head_fraction * context.family.num_heads)
            weights = context.weights_of(last)[:, :, 0]
            context.memory[context.layer] = looking_heads(weights, layout.visual, num_heads)
        chosen = context.memory.get(context.layer)
        if chosen is None:  # no row of the prompt has an image, so none was edited
            return None
        return torch.where(chosen[..., None], factors[:, None], 1.0)
