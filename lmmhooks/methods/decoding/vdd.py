"""
VDD: subtract what the model would say without its image, or with one meaningless token in the image's place.

Both readings show the prior of the language model; their mean is the negative branch if both are used.

Paper: "Debiasing Multimodal Large Language Models", arXiv 2403.05262 (later: "... via Penalization of Language
Priors"). Code: https://github.com/yfzhang114/LLaVA-Align (Apache-2.0). Differs from the release in that the mask of the
prompt with the meaningless token is its own (there it stays that of the prompt with image), greedy and beam search are
contrasted too, and any batch goes. The calibration of closed answer sets of the same paper acts on probabilities of
finished answers and is not part of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmmhooks.errors import MethodError
from lmmhooks.methods.base import Method, setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.view import ImageView, StepView

__all__ = ["Vdd"]

USES = ("none", "unk", "both")


@dataclass(frozen=True)
class Vdd(DecodingMethod):
    """Contrast with the language prior: ``(1 + alpha) L - alpha L_prior`` on plausible tokens."""

    id: ClassVar[str] = "vdd"
    paper: ClassVar[str] = "Debiasing Multimodal Large Language Models, arXiv 2403.05262"
    code: ClassVar[str] = "https://github.com/yfzhang114/LLaVA-Align"

    alpha: float = setting(
        0.5, help="Strength of the contrast, 0 or more (released code where scripts set none: 0.5); 0: no branch."
    )
    use: Literal["none", "unk", "both"] = setting(
        "both",
        help="The prior: prompt without its image ('none'), with one meaningless token in its place ('unk'), or the "
        "mean of both logits ('both').",
    )
    token: int | None = setting(
        None,
        help="Id of the meaningless token. None: the unknown token, 0, on the models of the release (LLaVA), else the "
        "padding token of the model's configuration.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(self.use in USES, "use", f"one of {', '.join(USES)}")
        self._require(self.token is None or self.token >= 0, "token", "the id of a token, or None")

    @classmethod
    def defaults_for(cls, family: Any) -> dict[str, Any]:
        return {"token": 0} if family.name in ("llava", "llava_next") else {}

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def check(self, family: Any) -> None:
        if self.token in family.visual_ids:
            raise MethodError(f"{self.id}: token={self.token} stands for an image in this model; give another id")

    def bind(self, family: Any) -> Method:
        if self.token is not None or self.use == "none" or not self.alpha:
            return self
        configs = (family.text_config, family.model.config, family.model.generation_config)
        found = [i for config in configs if isinstance(i := getattr(config, "pad_token_id", None), int)]
        if not found:
            raise MethodError(
                f"{self.id}: the configuration of {type(family.model).__name__} names no padding token to put in the "
                "place of images; give token=ID, or use='none'"
            )
        return replace(self, token=found[0])

    def branches(self, family: Any) -> list[Branch]:
        branches = [Branch("none", image="none"), Branch("unk", image="replaced")]
        return [branch for branch in branches if self.alpha and self.use in (branch.name, "both")]

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1 + self.alpha] + [-self.alpha / len(others)] * len(others)

    def replace_image(
        self, features: tuple[Tensor, ...], branch: Branch, image: ImageView
    ) -> tuple[Tensor, ...] | Tensor:
        return torch.tensor([self.token], device=image.prompt.device)
