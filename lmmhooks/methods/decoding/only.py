"""
ONLY: hold the prediction against one that leans on text, made of one attention layer and the last block.

In one layer, attention of the newest token is rid of outliers, and of the heads that lean towards the image by the
entropy of what they attend to. What the rest gathers goes straight to the last block's feed-forward part, the final
norm and the head. Where that prediction is close to the ordinary one they are added, else contrasted, on plausible
tokens. No extra forward: one attention row, one feed-forward part and one row of the head per step.

Differs from the released code: the image is where it is instead of at fixed positions, with padding left out, and the
last layer is that of the model; every row measures its own distance and drops its own heads, and stays as it is without
an image. Where predictions are added their weights sum to 4, an inverse temperature: compare with one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import DecodingMethod, contrast, cut
from lmmhooks.methods.decoding.view import AttentionRow, StepView

__all__ = ["Only", "entropy_of", "head_outputs", "text_leaning", "without_outliers"]

RESIDUAL = 0.2
"""Share of the residual stream that enters the last block (authors' code)."""
ORDINARY = 0.5
"""Share of the ordinary final state beside the text-leaning one (authors' code)."""
EPSILON = 1e-6
"""Inside the logarithm of the entropy (authors' code)."""


def without_outliers(weights: Tensor, among: Tensor) -> Tensor:
    """
    Attention with entries set to 0 that exceed mean plus standard deviation (unbiased) of a part of the keys.

    Parameters
    ----------
    weights
        ``[B, H, N]`` float32.
    among
        ``[B, N]`` bool, the part; entries outside it stay. Of a single key nothing is removed.
    """
    part = among[:, None]
    num = part.sum(dim=-1, keepdim=True)
    mean = (weights * part).sum(dim=-1, keepdim=True) / num
    variance = ((weights - mean).square() * part).sum(dim=-1, keepdim=True) / (num - 1)
    return weights.masked_fill(part & (weights > mean + variance.sqrt()), 0.0)


def entropy_of(weights: Tensor, among: Tensor, empty: float) -> Tensor:
    """Entropy ``[B, H]`` of attention on a part of the keys, which sums to 1; ``empty`` where nothing is left of it."""
    part = weights * among[:, None]
    share = part / part.sum(dim=-1, keepdim=True)
    entropy = -(share * (share + EPSILON).log()).sum(dim=-1)
    return entropy.masked_fill(entropy.isnan(), empty)


def text_leaning(weights: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """
    Attention of one token without outliers, and without the heads that lean towards the image.

    Parameters
    ----------
    weights
        ``[B, H, N]`` float32, after the softmax.
    text, image
        ``[B, N]`` bool; keys of neither (padding, the first token) stay as they are in the heads that stay.

    Returns
    -------
    Tensor
        ``[B, H, N]``, not renormalised. A head goes whose ratio of text to image entropy is below the mean of heads.
    """
    kept = without_outliers(without_outliers(weights, text), image)
    ratio = entropy_of(kept, text, 0.0) / entropy_of(kept, image, torch.inf)
    # The mean of equal numbers may round to more than each of them: no more than the largest, so that one head stays.
    least = torch.minimum(ratio.mean(dim=-1, keepdim=True), ratio.amax(dim=-1, keepdim=True))
    return kept.masked_fill((ratio < least)[..., None], 0.0)


def head_outputs(weights: Tensor, value: Tensor) -> Tensor:
    """Weights ``[B, H, N]`` on values ``[B, Hkv, N, d]`` that groups of heads share: ``[B, H * d]``, of their dtype."""
    grouped = weights.to(value.dtype).unflatten(1, (value.shape[1], -1))
    return (grouped @ value).flatten(1)


@dataclass(frozen=True)
class Only(DecodingMethod):
    """One-layer intervention (see the module docstring)."""

    id: ClassVar[str] = "only"
    paper: ClassVar[str] = (
        "ONLY: One-Layer Intervention Sufficiently Mitigates Hallucinations in LVLMs, ICCV 2025, arXiv 2507.00898"
    )
    code: ClassVar[str] = "https://github.com/zifuwan/ONLY"
    lazy_allowed: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "chair": {"gamma": 0.25},  # authors' scripts
        "mme": {"gamma": 0.25, "beta": 0.4},
    }

    a_pos: float = setting(3.0, help="Weight of the text-leaning prediction where it is added, 0 or more (release: 3).")
    a_neg: float = setting(1.0, help="Strength of the contrast where it is subtracted, 0 or more (release: 1).")
    gamma: float = setting(
        0.2,
        help="Distance below which predictions are added, 0 or more; summed absolute difference of probabilities, at "
        "most 2 (release: 0.2 for POPE, 0.25 for CHAIR and MME).",
    )
    layer: int = setting(0, help="Decoder layer whose attention is used, 0-based (release: 0).")
    lazy: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("a_pos", "a_neg", "gamma", "layer"):
            self._require(getattr(self, name) >= 0, name, "0 or more")

    def check(self, family: Any) -> None:
        depth = family.num_layers
        self._require(self.layer < depth, "layer", f"in 0 ... {depth - 1}, the decoder layers of this model")
        # A model without these parts is refused here, before anything runs.
        family.output_projection_of(family.layers[self.layer])
        for part in (family.attention_norm_of, family.mlp_norm_of, family.mlp_of):
            part(family.layers[-1])

    @property
    def acts(self) -> bool:
        """Whether there is more than the plausibility cut."""
        return bool(self.a_pos or self.a_neg)

    @property
    def is_identity(self) -> bool:
        return not self.acts and self.beta == 0

    def reads(self, family: Any) -> Sequence[int]:
        return (family.num_layers - 1, family.num_layers) if self.acts else ()

    def reads_attention(self, family: Any) -> Sequence[int]:
        return (self.layer,) if self.acts else ()

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        keep = self.keep(main)
        if not self.acts:
            return contrast([main], [1.0], cut(keep, view))
        row = view.rows[self.layer]
        leaning = self._leaning_logits(row, view).to(main.device)
        distance = (main.softmax(dim=-1) - leaning.softmax(dim=-1)).abs().sum(dim=-1, keepdim=True)
        close = distance < self.gamma
        weights = [torch.where(close, 1.0, 1 + self.a_neg), torch.where(close, self.a_pos, -self.a_neg)]
        shown = row.layout.visual[: len(main)].any(dim=1, keepdim=True).to(main.device)
        return torch.where(shown, contrast([main, leaning], weights, cut(keep, view)), main)

    def _leaning_logits(self, row: AttentionRow, view: StepView) -> Tensor:
        """``[B, vocabulary]``."""
        family, depth = view.family, view.family.num_layers
        layout, device = row.layout, row.weights.device
        valid, image = (part[: len(row.weights)].to(device) for part in (layout.valid, layout.visual))
        text = valid & ~image & (valid.cumsum(dim=1) > 1)
        gathered = head_outputs(text_leaning(row.weights, text, image), row.value)
        last = family.layers[-1]
        # One position per row: feed-forward parts may want the axis.
        states = family.apply(family.output_projection_of(family.layers[self.layer]), gathered[:, None])
        normed = family.apply(family.attention_norm_of(last), states)
        states = normed + RESIDUAL * view.states[depth - 1][:, None].to(normed.device)
        states = states + family.apply(family.mlp_of(last), family.apply(family.mlp_norm_of(last), states))
        final = family.apply(family.norm, states)
        return family.token_logits(final + ORDINARY * view.states[depth][:, None].to(final.device))[:, 0]
