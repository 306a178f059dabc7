"""
PBA (prompt-based adjustment): ask the model to say yes, in words.

A spurious baseline: the question gets `suffix` at its end, and the model answers that prompt, nothing else. The main
rows read it themselves, so it costs nothing but the tokens of the suffix; ``generate`` still returns the prompt as it
was given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.prompts import Words, are_words, encode, insert, plain_words, question_span

__all__ = ["Pba"]


@dataclass(frozen=True)
class Pba(DecodingMethod):
    """A suffix of the question that leans towards yes."""

    id: ClassVar[str] = "pba"
    paper: ClassVar[str] = "The Mirage of Performance Gains, arXiv 2504.10020 (spurious baseline)"
    code: ClassVar[str] = "https://github.com/ustc-hyin/cd_rethink"

    suffix: Words = setting(
        " Answer the question using a single word or phrase. Answer yes whenever possible.",
        help="Put after the question, in front of what opens the answer: text (needs the processor), or token ids; "
        "empty: nothing.",
    )
    beta: float = field(default=0.0, init=False)
    lazy: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "suffix", plain_words(self.suffix))
        self._require(are_words(self.suffix), "suffix", "text, or token ids")

    @property
    def is_identity(self) -> bool:
        return not self.suffix

    @property
    def needs_tokenizer(self) -> bool:
        return isinstance(self.suffix, str) and bool(self.suffix)

    def main_branch(self, family: Any) -> Branch:
        return Branch("main", text="edited")

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        span = question_span(tokens, context)
        return tokens if span is None else insert(tokens, span[1], encode(self.suffix, context))
