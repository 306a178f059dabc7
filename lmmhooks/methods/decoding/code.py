"""
CODE: contrast the image with the model's own description of it, as much as both agree.

What is predicted from the description instead of the image misses what the image alone shows. A bounded divergence of
both predictions drives strength and cut: where they agree the contrast is strong and cuts little, where they differ it
is weak and only likely tokens stay.

Paper: "CODE: Contrasting Self-generated Description to Combat Hallucination in Large Multi-modal Models", NeurIPS 2024,
arXiv 2406.01920. Code: https://github.com/IVY-LVLM/CODE (MIT). The description is generated once per image, greedily,
under whatever other methods act on the model, and reused for all questions about it. The wording of the instruction is
ours: UNVERIFIED. Several images of a prompt are described together, in the place of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod, contrast, cut
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.prompts import Words, are_words, encode, plain_words, question_span
from lmmhooks.methods.decoding.view import ImageView, StepView

__all__ = ["Code", "bounded_divergence"]

INSTRUCTION = (
    "Describe the image comprehensively: all visible elements, their attributes, and how they interact, so that any "
    "question about the image could be answered from the description alone."
)


def bounded_divergence(main: Tensor, other: Tensor, power: float) -> Tensor:
    """
    ``0.5 sum_v log2(|p - q|^power + 1) (p + q)`` of the distributions of two rows of logits.

    Parameters
    ----------
    main, other
        float32 ``[B, vocabulary]``; symmetric in both.
    power
        Above 0.

    Returns
    -------
    Tensor
        ``[B, 1]`` in [0, 1]: 0 for equal distributions, 1 for disjoint ones.
    """
    p, q = main.softmax(dim=-1), other.softmax(dim=-1)
    return 0.5 * (torch.log2((p - q).abs() ** power + 1) * (p + q)).sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Code(DecodingMethod):
    """Contrast with a description: ``(1 + w) L - w L_description``, ``w = 1 - D``, cut at ``D``."""

    id: ClassVar[str] = "code"
    paper: ClassVar[str] = "CODE: Contrasting Self-generated Description, NeurIPS 2024, arXiv 2406.01920"
    code: ClassVar[str] = "https://github.com/IVY-LVLM/CODE"
    lazy_allowed: ClassVar[bool] = False

    # The divergence is the cut, and it needs the branch.
    beta: float = field(default=0.0, init=False)
    lazy: bool = field(default=False, init=False)
    power: float = setting(
        0.2,
        help="Exponent of the difference of probabilities in the divergence, above 0 (cd_alpha of the release: 0.2).",
    )
    description: Words | None = setting(
        None, help="Text, or token ids, that stands in the place of every image. None: the model describes it itself."
    )
    instruction: Words = setting(
        INSTRUCTION, help="What the model is asked for a description, text or token ids, in the place of the question."
    )
    max_description: int = setting(256, help="Longest description in tokens, 1 or more (UNVERIFIED).")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("description", "instruction"):
            object.__setattr__(self, name, plain_words(getattr(self, name)))
        self._require(self.power > 0, "power", "above 0")
        self._require(self.description is None or are_words(self.description), "description", "text, token ids or None")
        self._require(are_words(self.instruction) and bool(self.instruction), "instruction", "text, or token ids")
        valid = isinstance(self.max_description, int) and self.max_description >= 1
        self._require(valid, "max_description", "an integer, 1 or more")

    @property
    def needs_tokenizer(self) -> bool:
        return isinstance(self.instruction if self.description is None else self.description, str)

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("description", image="replaced")]

    def asks_first(self, family: Any) -> tuple[Branch, int] | None:
        return (Branch("describe", text="edited"), self.max_description) if self.description is None else None

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        span = question_span(tokens, context)
        if span is None:
            return tokens
        start, stop = span
        return torch.cat([tokens[:start], tokens.new_tensor(encode(self.instruction, context)), tokens[stop:]])

    def replace_image(
        self, features: tuple[Tensor, ...], branch: Branch, image: ImageView
    ) -> tuple[Tensor, ...] | Tensor:
        if self.description is not None:
            return image.prompt.new_tensor(encode(self.description, BranchContext(image.family, image.processor)))
        assert image.reply is not None
        return image.reply if image.ordinal == 0 else image.reply[:0]

    def combine(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Tensor:
        (other,) = others
        divergence = bounded_divergence(main, other, self.power)
        probability = main.softmax(dim=-1)
        keep = probability >= divergence * probability.amax(dim=-1, keepdim=True)
        return contrast([main, other], [2 - divergence, divergence - 1], cut(keep, view))
