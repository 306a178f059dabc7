"""
DAMRO: subtract what the model would say if it saw only the patches its vision tower is fixated on.

A few background patches draw most of the attention of the class token, later draw the decoder's as well, and go along
with hallucinated objects. A short reading of the prompt that shows nothing but those outliers is the negative branch.

Paper: "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination", EMNLP 2024, arXiv 2410.04514.
Code: https://github.com/coder-gx/DAMRO. As in its LLaVA code, attention is that of one head as wide as the tower, and
outliers enter in descending order of attention; of an image in tiles only the crop that shows all of it, and one
newline token, take part. Differs from the release in that processors and warpers (temperature, top-p, repetition
penalty) act on the contrast, in every mode of generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import ImageView, StepView
from lmmhooks.methods.probe import Probe
from lmmhooks.methods.vision_scores import saliency_probe
from lmmhooks.vision import ImageTokens

__all__ = ["Damro", "outlier_tokens"]


def outlier_tokens(attention: Tensor, tokens: ImageTokens, num: int) -> Tensor:
    """
    The tokens an outlier branch shows.

    Parameters
    ----------
    attention
        ``[n]`` score per visual token; NaN at tokens that show no place in the image.
    tokens
        What each of them shows.
    num
        Outliers wanted; all candidates where there are fewer.

    Returns
    -------
    Tensor
        Long indices into the n tokens: outliers by descending score, a tie going to the earlier token, then the first
        newline token of an image that has any.
    """
    nowhere = tokens.crop < 0
    candidates = torch.ones_like(nowhere) if bool(nowhere.all()) else ~nowhere
    if tokens.tiling is not None:
        candidates = candidates & (tokens.crop == tokens.tiling.overview)
    places = candidates.nonzero().flatten().to(attention.device)
    best = attention[places].sort(descending=True, stable=True).indices[:num]
    newlines = (nowhere & ~candidates).nonzero().flatten()[:1] if tokens.tiling is not None else nowhere[:0].nonzero()
    return torch.cat([places[best], newlines.flatten().to(places)])


@dataclass(frozen=True)
class Damro(DecodingMethod):
    """Contrast with the outliers of class-token attention: ``(1 + alpha) L - alpha L_outliers`` on plausible tokens."""

    id: ClassVar[str] = "damro"
    paper: ClassVar[str] = "DAMRO: Dive into the Attention Mechanism of LVLM, EMNLP 2024, arXiv 2410.04514"
    code: ClassVar[str] = "https://github.com/coder-gx/DAMRO"

    alpha: float = setting(
        2.0, help="Strength of the contrast, 0 or more (scripts: 2 on LLaVA-1.5 and LLaVA-NeXT); 0: no branch."
    )
    topk: int = setting(10, help="Outliers per image, 1 or more (scripts: 10 on LLaVA-1.5 and LLaVA-NeXT).")
    per_head_mean: bool = setting(
        False,
        help="Rank by attention per head, mean over heads, as the paper words it, instead of one head of full width as "
        "the LLaVA code computes it.",
    )
    layer: int | None = setting(
        None,
        help="Vision layer whose attention is read, 0-based. None: the one whose output the projector takes. Towers "
        "without a class token are ranked by the attention a patch receives: UNVERIFIED.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(isinstance(self.topk, int) and self.topk >= 1, "topk", "an integer, 1 or more")

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def check(self, family: Any) -> None:
        self.probes(family)

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("outliers", image="replaced")] if self.alpha else []

    def probes(self, family: Any) -> list[Probe]:
        signal: Literal["vision_cls", "vision_cls_wide"] = "vision_cls" if self.per_head_mean else "vision_cls_wide"
        return [saliency_probe(self, family, self.layer, signal=signal)] if self.alpha else []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1 + self.alpha, -self.alpha]

    def replace_image(
        self, features: tuple[Tensor, ...], branch: Branch, image: ImageView
    ) -> tuple[Tensor, ...] | Tensor:
        (attention,) = image.readings.values()
        index = outlier_tokens(attention, image.tokens, self.topk)
        return tuple(tensor[index.to(tensor.device)] for tensor in features)
