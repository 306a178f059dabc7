"""
MoD: ask the model again with only what it attended to, and add or subtract the answer depending on how it compares.

Only the most attended visual tokens keep their embeddings in the second branch. If the first prediction hardly changes,
attention was right and both predictions are added; if it changes, attention was wrong and the second is subtracted.

Paper: "Mixture of Decoding: An Attention-Inspired Adaptive Decoding Strategy to Mitigate Hallucinations in LVLMs",
Findings of ACL 2025, arXiv 2505.17061. Code: https://github.com/xlchen0205/MoD. The choice is made once per row, at the
first token, and goes with its row in beam search. Differs from the release in that attention is read once, while the
prompt is read (its scripts read it anew at every step, without a cache; so does this method without one, and chooses
anew), that the sampler runs as published minus the
assertion that stops it, and that any batch, image span and mode of generation goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.attended import keep_features
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import ImageView, StepView

__all__ = ["Mod", "divergence", "most_attended"]

#: Probabilities are clipped to [CLIP, 1 - CLIP] before logarithms (released code).
CLIP = 5e-8


def divergence(main: Tensor, other: Tensor) -> Tensor:
    """
    Jensen-Shannon divergence of the distributions of two rows of logits, in nats.

    Probabilities are clipped and not normalised again, as in the released code.

    Parameters
    ----------
    main, other
        float32 ``[B, vocabulary]``.

    Returns
    -------
    Tensor
        ``[B, 1]``.
    """
    p, q = (logits.softmax(dim=-1).clamp(CLIP, 1 - CLIP) for logits in (main, other))
    middle = ((p + q) / 2).log()
    both = p * (p.log() - middle) + q * (q.log() - middle)
    return both.sum(dim=-1, keepdim=True) / 2


def most_attended(attention: Tensor, share: float) -> Tensor:
    """
    The visual tokens that stay: all but the ``int(n * (1 - share))`` least attended ones.

    Parameters
    ----------
    attention
        ``[layers, n]`` of the last prompt token, head mean; layers are summed.
    share
        In [0, 1].

    Returns
    -------
    Tensor
        Bool ``[n]``; of equally attended tokens the earlier ones leave first.
    """
    total = attention.sum(dim=0)
    order = total.sort(stable=True).indices
    num_blank = int(len(total) * (1 - share))
    return torch.ones_like(order, dtype=torch.bool).scatter(0, order[:num_blank], False)


@dataclass(frozen=True)
class Mod(DecodingMethod):
    """Add or subtract the prediction of attended tokens, decided at the first token."""

    id: ClassVar[str] = "mod"
    paper: ClassVar[str] = "Mixture of Decoding, Findings of ACL 2025, arXiv 2505.17061"
    code: ClassVar[str] = "https://github.com/xlchen0205/MoD"
    lazy_allowed: ClassVar[bool] = False

    alpha_add: float = setting(
        4.0, help="Weight of the second prediction where it is added, 0 or more (paper and scripts: 4)."
    )
    alpha_subtract: float = setting(
        1.0, help="Strength of the contrast where it is subtracted, 0 or more (paper and scripts: 1)."
    )
    tau: float = setting(
        0.05,
        help="Jensen-Shannon divergence in nats, 0 or more, below which predictions agree and are added (paper: 0.05).",
    )
    share: float = setting(
        0.2, help="Share in [0, 1] of the visual tokens that stay in the second branch (paper: 0.2)."
    )
    beta: float = setting(
        0.5,
        help="Plausibility cut in [0, 1] (paper and scripts: 0.5); with the sum of weights of 5 it is close to greedy: "
        "compare with the cut alone.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_add", "alpha_subtract", "tau"):
            self._require(getattr(self, name) >= 0, name, "0 or more")
        self._require(0 <= self.share <= 1, "share", "in [0, 1]")

    @property
    def is_identity(self) -> bool:
        return not self._branches and self.beta == 0

    @property
    def _branches(self) -> bool:
        return bool(self.alpha_add or self.alpha_subtract)

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("attended", image="features", after_main=True)] if self._branches else []

    def reads_prompt(self, family: Any) -> Sequence[int]:
        return range(family.num_layers) if self._branches else ()

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float | Tensor]:
        (other,) = others
        if step == 0 or "added" not in view.memory:
            # Where a forward asks for several positions of the prompt, the last one is the first token.
            view.memory["added"] = divergence(main, other) < self.tau
        added = view.memory["added"]
        one = torch.ones_like(added, dtype=main.dtype)
        return [
            torch.where(added, one, 1 + self.alpha_subtract),
            torch.where(added, self.alpha_add * one, -self.alpha_subtract),
        ]

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        if "added" in memory:
            memory["added"] = memory["added"].index_select(0, rows.to(memory["added"].device))

    def transform_features(self, features: tuple[Tensor, ...], branch: Branch, image: ImageView) -> tuple[Tensor, ...]:
        assert image.attention is not None
        return keep_features(features, most_attended(image.attention, self.share), image)
