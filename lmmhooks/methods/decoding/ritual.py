"""
RITUAL: add the logits of one randomly transformed copy of the image, so that what several views agree on wins.

``L + alpha L_transformed`` on plausible tokens. One of six transforms is drawn per image, seeded by `seed` and the
pixels, and noted with its parameters in ``patch.stats.notes``; `transform` fixes it.

Differs from the release: pixels are transformed after the image processor instead of before it, in the size the model
sees, brought back to RGB by the processor's mean and deviation (CLIP's where ``wrap`` got no processor). An image that
is seen as several crops keeps its tiling and has every crop transformed alike; where the encoder sees nothing but tiles
(InternVL), every tile draws a transform. Greedy search and beams are combined too, not only sampling. RITUAL+, which
asks the model for the transform, is not released and not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.transforms import TRANSFORMS
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Ritual"]


@dataclass(frozen=True)
class Ritual(DecodingMethod):
    """Random image transformations (see the module docstring)."""

    id: ClassVar[str] = "ritual"
    paper: ClassVar[str] = (
        "RITUAL: Random Image Transformations as a Universal Anti-hallucination Lever, arXiv 2405.17821"
    )
    code: ClassVar[str] = "https://github.com/sangminwoo/RITUAL"

    alpha: float = setting(
        3.0,
        help="Weight of the transformed view, 0 or more (paper and scripts: 3). Weights sum to 1 + alpha, which "
        "sharpens like a temperature of 1 / (1 + alpha): compare with `temperature` and `equal-branch`.",
    )
    transform: str | None = setting(
        None, help=f"One of {', '.join(TRANSFORMS)}; None, as released: one of them at random for each image."
    )
    seed: int = setting(0, help="Seed of transforms, 0 or more; each image draws from this seed and its own pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(self.transform is None or self.transform in TRANSFORMS, "transform", ", ".join(TRANSFORMS))
        self._require(self.seed >= 0, "seed", "0 or more")

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("transformed", image="pixels")] if self.alpha else []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1.0, self.alpha]

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        drawn = int(torch.randint(len(TRANSFORMS), (), generator=generator))
        name = self.transform or list(TRANSFORMS)[drawn]
        rgb, parameters = TRANSFORMS[name](context.to_rgb(pixels), generator)
        context.notes.append({"image": context.index, "transform": name, **parameters})
        return context.from_rgb(rgb)
