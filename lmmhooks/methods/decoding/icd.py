"""
ICD: subtract what the model says when it is told to be a confused observer, for that is where it hallucinates.

``(1 + alpha) L - alpha L_disturbed`` on plausible tokens; both branches see the image. The disturbance stands after
the image and before the question (`place` "question", as a re-implementation in SID's code has it), or is the system
message (`place` "system", the released LLaVA path). `vcd_alpha` adds the contrast with a noised image: ICD+VCD sums
both masked contrasts, weights ``2 + alpha + vcd_alpha; -alpha; -vcd_alpha``, which doubles the scale of the logits:
compare with the control `temperature`.

Differs from the release: greedy search and beams are contrasted too; its Q-Former path, which disturbs the extraction
of visual features instead of the prompt, is not here. Which disturbance gave the published table, its code does not
say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.prompts import Words, are_words, encode, insert, plain_words, question_span, with_system
from lmmhooks.methods.decoding.vcd import NUM_STEPS, add_noise
from lmmhooks.methods.decoding.view import StepView

__all__ = ["Icd"]

PLACES = ("question", "system")


@dataclass(frozen=True)
class Icd(DecodingMethod):
    """Instruction contrastive decoding (see the module docstring)."""

    id: ClassVar[str] = "icd"
    paper: ClassVar[str] = "Instruction Contrastive Decoding, Findings of ACL 2024, arXiv 2403.18715"
    code: ClassVar[str] = "https://github.com/p1k0pan/ICD"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "caption": {"disturbance": "You are a confused image caption model."},  # SID's code, for captions
        "llava": {"place": "system"},  # the authors' code for LLaVA
        "icd-vcd": {"vcd_alpha": 1.0},
    }

    alpha: float = setting(1.0, help="Strength of the contrast, 0 or more (paper: 1); 0: no disturbed branch.")
    disturbance: Words = setting(
        "You are a confused object detector.",
        help="What disturbs, as text (needs the processor) or as token ids; empty: no disturbed branch. Default: SID's "
        "code, for yes/no questions. The authors tried five, such as 'You are a confused objects detector to provide a "
        "fuzzy overview or impression of the image.'",
    )
    place: str = setting("question", help="'question': after the image, before the question; 'system': system message.")
    vcd_alpha: float | None = setting(
        None,
        help="Strength of an added contrast with the noised image, 0 or more; None: ICD alone. 0 adds L once more.",
    )
    noise_step: int = setting(500, help="Diffusion step in 0 ... 999 of that noise, as in vcd.")
    seed: int = setting(0, help="Seed of that noise, 0 or more.")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "disturbance", plain_words(self.disturbance))
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(self.place in PLACES, "place", " or ".join(PLACES))
        self._require(are_words(self.disturbance), "disturbance", "text, or token ids")
        text = isinstance(self.disturbance, str) or not self.disturbance
        self._require(text or self.place == "question", "disturbance", "text where place='system'")
        self._require(
            self.vcd_alpha is None or self.vcd_alpha > 0 or (self.vcd_alpha == 0 and self.strength > 0),
            "vcd_alpha",
            "above 0, or 0 beside a disturbed branch, or None",
        )
        self._require(0 <= self.noise_step < NUM_STEPS, "noise_step", f"in 0 ... {NUM_STEPS - 1}")
        self._require(self.seed >= 0, "seed", "0 or more")

    @property
    def strength(self) -> float:
        """Of the disturbed branch; 0 without a disturbance."""
        return self.alpha if self.disturbance else 0.0

    @property
    def is_identity(self) -> bool:
        return self.strength == 0 and self.vcd_alpha is None and self.beta == 0

    @property
    def needs_tokenizer(self) -> bool:
        return self.strength > 0 and isinstance(self.disturbance, str)

    def branches(self, family: Any) -> list[Branch]:
        disturbed = [Branch("disturbed", text="edited")] if self.strength else []
        return [*disturbed, Branch("noised", image="pixels")] if self.vcd_alpha else disturbed

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float]:
        added = 0.0 if self.vcd_alpha is None else 1 + self.vcd_alpha
        strengths = [strength for strength in (self.strength, self.vcd_alpha) if strength]
        return [1 + self.strength + added, *(-strength for strength in strengths)]

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        span = question_span(tokens, context)
        if span is None:  # a row without an image stays what it is
            return tokens
        if self.place == "system":
            assert isinstance(self.disturbance, str)
            return with_system(self, tokens, self.disturbance, context)
        text = f"{self.disturbance} " if isinstance(self.disturbance, str) else self.disturbance
        return insert(tokens, span[0], encode(text, context))

    def transform_pixels(
        self, pixels: Tensor, branch: Branch, generator: torch.Generator, context: BranchContext
    ) -> Tensor:
        return add_noise(pixels, self.noise_step, generator)
