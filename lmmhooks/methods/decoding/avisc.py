"""
AvisC: subtract what the model would say if it saw only the tokens it stares at.

A few "blind" visual tokens draw most of the attention of the last prompt token, in the layers that look at the image
most, without carrying what is in it. The biased branch sees those alone: all other visual embeddings are zero.

Paper: "Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models",
arXiv 2405.17820. Code: https://github.com/sangminwoo/AvisC (MIT). Blind tokens are found once, as the prompt is read,
as in the release with a cache; greedy and beam search are contrasted too, and any batch and image span goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.attended import FILLS, Fill, keep_features
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import ImageView, StepView

__all__ = ["Avisc", "blind_tokens", "staring_layers"]


def staring_layers(attention: Tensor, gamma: float) -> Tensor:
    """
    Layers that hold the first ``gamma`` of all attention to the image, largest share first.

    Parameters
    ----------
    attention
        ``[layers, n]``.
    gamma
        In [0, 1].

    Returns
    -------
    Tensor
        Bool ``[layers]``, at least one True; ties go to the earlier layer.
    """
    share = attention.sum(dim=1)
    order = (share / share.sum()).sort(descending=True, stable=True)
    num = (order.values.cumsum(dim=0) < gamma).sum() + 1
    chosen = torch.zeros_like(order.indices, dtype=torch.bool)
    return chosen.scatter(0, order.indices, (share.new_ones(len(share)).cumsum(dim=0) <= num))


def blind_tokens(attention: Tensor, layer_gamma: float, lam: float) -> Tensor:
    """
    Visual tokens whose attention stands out.

    Parameters
    ----------
    attention
        ``[layers, n]`` of the last prompt token, head mean.
    layer_gamma
        For `staring_layers`.
    lam
        Standard deviations above the mean.

    Returns
    -------
    Tensor
        Bool ``[n]``.
    """
    layers = staring_layers(attention, layer_gamma)[:, None]
    mean = (attention * layers).sum(dim=0) / layers.sum()
    # With one token there is no deviation (NaN); it stands out of nothing.
    spread = mean.std() if len(mean) > 1 else mean.new_zeros(())
    return mean >= mean.mean() + lam * spread


@dataclass(frozen=True)
class Avisc(DecodingMethod):
    """Contrast with the blind tokens: ``(1 + alpha) L - alpha L_blind`` on plausible tokens."""

    id: ClassVar[str] = "avisc"
    paper: ClassVar[str] = "Don't Miss the Forest for the Trees: Attentional Vision Calibration, arXiv 2405.17820"
    code: ClassVar[str] = "https://github.com/sangminwoo/AvisC"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "amber-script": {"alpha": 2.5},  # the authors' AMBER and LLaVA-Bench shell scripts
        "pope-script": {"alpha": 3.0},  # contained in the list of the POPE script
    }

    alpha: float = setting(
        1.0,
        help="Strength of the contrast, 0 or more (default of the released commands; scripts: 1 to 3); 0: no branch.",
    )
    layer_gamma: float = setting(
        0.5, help="Share in [0, 1] of the attention to the image that the chosen layers hold (released code: 0.5)."
    )
    lam: float = setting(
        1.0,
        help="Standard deviations above the mean from which on a token is blind (shell scripts: 1; default of the "
        "released command: 0.99). Very small: all tokens are blind, and the branch is the main one.",
    )
    fill: Fill = setting(
        "zeros", help="What the other visual embeddings become: 'zeros' (paper), 'ones' or 'noise' (released options)."
    )
    seed: int = setting(0, help="Seed of the noise, 0 or more; each image draws from this seed and its own pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(0 <= self.layer_gamma <= 1, "layer_gamma", "in [0, 1]")
        self._require(self.fill in FILLS, "fill", f"one of {', '.join(FILLS)}")
        self._require(self.seed >= 0, "seed", "0 or more")

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("blind", image="features", after_main=True)] if self.alpha else []

    def reads_prompt(self, family: Any) -> Sequence[int]:
        return range(family.num_layers) if self.alpha else ()

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1 + self.alpha, -self.alpha]

    def transform_features(self, features: tuple[Tensor, ...], branch: Branch, image: ImageView) -> tuple[Tensor, ...]:
        assert image.attention is not None
        return keep_features(features, blind_tokens(image.attention, self.layer_gamma, self.lam), image, self.fill)
