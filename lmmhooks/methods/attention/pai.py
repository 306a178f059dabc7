"""
PAI: raise the attention logits that the row being predicted gives to the image, and guide against text alone.

Decoders go on writing what the text suggests ("text inertia"). In every head, logits of image keys grow by a fraction
of their magnitude, ``l + alpha |l|``, before the softmax; the prediction then moves away from that of the same prompt
without its image (`pai-guidance`). The reading without image has no image keys, so the boost does not touch it.

Differs from the released code: the boost acts from the first token on, which the release mutes when guidance is on
(``compat='release'`` has it so); any batch and any number of images; log-probabilities where the paper writes
probabilities, as the code does. Defaults of models that PAI did not publish settings for are those of its command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lmmhooks.methods.attention.base import AttentionContext
from lmmhooks.methods.attention.boosting import GuidedBoost
from lmmhooks.methods.base import Method, setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pai"]

#: Boost by model. Source: the paper for LLaVA-1.5, through a secondary summary; it has one value for both sizes.
ALPHAS: dict[tuple[str, int, int], float] = {("llava", 4096, 32): 0.5, ("llava", 5120, 40): 0.5}


@dataclass(frozen=True)
class Pai(GuidedBoost):
    """Pay attention to image (see the module docstring)."""

    id: ClassVar[str] = "pai"
    paper: ClassVar[str] = (
        "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs, ECCV 2024, "
        "arXiv 2407.21771"
    )
    code: ClassVar[str] = "https://github.com/LALBJ/PAI"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Defaults of the released command line; its README runs gamma 1.1.
        "released_cli": {"alpha": 0.2, "gamma": 2.0, "compat": "release"},
    }

    alpha: float | None = setting(
        None,
        help="Boost as a fraction of the logit's magnitude, in [0, 1]; above 1 negative logits would change their "
        "order. None: 0.5 on LLaVA-1.5 (paper, UNVERIFIED: read in a secondary summary), else 0.2 (released command "
        "line).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha is None or 0 <= self.alpha <= 1, "alpha", "in [0, 1] or None")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        alpha = ALPHAS.get((family.name, family.hidden_size, family.num_layers))
        return {} if alpha is None else {"alpha": alpha}

    def bind(self, family: Any) -> Method:
        return replace(super().bind(family), alpha=0.2 if self.alpha is None else self.alpha)  # type: ignore[call-arg]

    @property
    def boosts(self) -> bool:
        return self.alpha != 0

    def strengths(self, context: AttentionContext) -> Tensor:
        assert self.alpha is not None, "filled in when the method is bound to a model"
        return self.alpha * context.layout.visual
