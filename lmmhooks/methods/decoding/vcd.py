"""
VCD: subtract what the model would say to a noised copy of the image, because that is mostly language prior.

Paper: "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding", CVPR
2024, arXiv 2311.16922. Code: https://github.com/DAMO-NLP-SG/VCD. Differs from the release in two points: greedy and
beam search are contrasted too (the release runs them unchanged), and noise is drawn per image from the seed and the
pixels instead of the global generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Vcd", "add_noise", "signal_levels"]

NUM_STEPS = 1000


@cache
def signal_levels() -> Tensor:
    """
    Share of signal variance left after every step of the diffusion schedule.

    Returns
    -------
    Tensor
        float64 ``[1000]`` on the CPU, decreasing; index 0 is after one step of noise. Per-step variances grow as a
        sigmoid from 1e-5 to 0.005 (authors' code, ``add_diffusion_noise``).
    """
    variance = torch.sigmoid(torch.linspace(-6, 6, NUM_STEPS, dtype=torch.float64)) * (0.005 - 1e-5) + 1e-5
    return (1 - variance).cumprod(dim=0)


def add_noise(pixels: Tensor, noise_step: int, generator: torch.Generator) -> Tensor:
    """
    ``sqrt(a) * pixels + sqrt(1 - a) * noise`` with ``a`` the signal level of a step.

    Parameters
    ----------
    pixels
        float32, any shape, normalised by mean and standard deviation; not changed.
    noise_step
        Index into `signal_levels`.
    generator
        On the CPU, whatever the device of the pixels, so that every device sees the same noise.
    """
    level = signal_levels()[noise_step]
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return float(level.sqrt()) * pixels + float((1 - level).sqrt()) * noise


@dataclass(frozen=True)
class Vcd(DecodingMethod):
    """Visual contrastive decoding: ``(1 + alpha) L - alpha L_noised`` on plausible tokens."""

    id: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "Visual Contrastive Decoding, CVPR 2024, arXiv:2311.16922"
    code: ClassVar[str] = "https://github.com/DAMO-NLP-SG/VCD"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pope-script": {"beta": 0.2},  # the authors' POPE shell script
        "mirage": {"noise_step": 900},  # arXiv 2504.10020, default of the study
    }

    alpha: float = setting(1.0, help="Strength of the contrast, 0 or more (paper and scripts: 1); 0: no noised branch.")
    noise_step: int = setting(
        500, help="Diffusion step in 0 ... 999 up to which the image is noised (paper: 500; 999 in some benchmarks)."
    )
    seed: int = setting(0, help="Seed of the noise, 0 or more; each image draws from this seed and its own pixels.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(0 <= self.noise_step < NUM_STEPS, "noise_step", f"in 0 ... {NUM_STEPS - 1}")
        self._require(self.seed >= 0, "seed", "0 or more")

    @property
    def is_identity(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("noised", image="pixels")] if self.alpha else []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        return [1 + self.alpha, -self.alpha]

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        return add_noise(pixels, self.noise_step, generator)
