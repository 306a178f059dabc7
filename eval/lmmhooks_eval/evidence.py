"""
What a model was about to say, read off its next-token scores while it answers.

At the first token of a yes/no answer the *margin* is ``log p(Yes) - log p(No)`` as the method makes the scores, before
any processor, temperature or nucleus, and before a plausibility cut: a word that is cut off has no score left that
could be compared. At every token the *gap* is the difference between the two largest scores: a cut ``beta`` leaves one
token if and only if the gap exceeds ``-log(beta)``, and no method with that cut can then say anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmmhooks.methods.words import answer_ids
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.task import AnswerWords

__all__ = ["UNSAYABLE", "Evidence", "word_tokens"]

UNSAYABLE = 1e4
"""Margin of a document for which only one of the words is left, with its sign: JSON holds no infinity."""


def word_tokens(tokenizer: Any, words: AnswerWords) -> tuple[list[int], list[int]]:
    """
    Tokens with which the two answers begin: the word, and the word after a space, where each is one token.

    Raises
    ------
    TaskError
        If the tokenizer begins both words with the same token, so that the first token says nothing.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    yes, no = (answer_ids(encode, word) for word in (words.positive, words.negative))
    if set(yes) & set(no):
        raise TaskError(
            f"this tokenizer begins {words.positive!r} and {words.negative!r} with the same token; use words that "
            "differ in their first one"
        )
    return yes, no


class Evidence:
    """
    Collects margins and gaps of one batch; hand it to `lmmhooks.engines.watching.watched_scores`.

    Parameters
    ----------
    size
        Documents in the batch.
    words
        From `word_tokens`; None where there is no margin to read.
    """

    def __init__(self, size: int, words: tuple[Sequence[int], Sequence[int]] | None) -> None:
        self.size = size
        self.words = words
        self._margins: Tensor | None = None
        self._gaps: list[Tensor] = []
        self._beams = False

    def __call__(self, scores: Tensor, uncut: Tensor) -> None:
        """Note one step."""
        if not self._gaps and self.words is not None:
            # Beams of a document lie side by side and are the same at its first token.
            rows = uncut[:: uncut.shape[0] // self.size].float()
            yes, no = (rows[:, list(ids)].logsumexp(dim=-1) for ids in self.words)
            self._margins = yes - no
        self._beams |= scores.shape[0] != self.size
        best = scores.topk(2, dim=-1).values.float()
        self._gaps.append(best[:, 0] - best[:, 1])

    def margins(self) -> list[float | None]:
        """
        One number per document, in logits; positive for the first word.

        More than one spelling of a word counts with the sum of their probabilities. None where neither word can be
        said, or nothing was asked for.
        """
        if self._margins is None:
            return [None] * self.size
        clipped = self._margins.clamp(-UNSAYABLE, UNSAYABLE).tolist()
        return [None if value != value else round(value, 5) for value in clipped]

    def gaps(self, lengths: Sequence[int]) -> list[list[float] | None]:
        """
        Gaps of the tokens of every document, infinite ones as `UNSAYABLE`; None under beam search.

        Parameters
        ----------
        lengths
            Tokens of each answer; what is computed beyond its end is no step of it.
        """
        if self._beams or not self._gaps:
            return [None] * self.size
        table = torch.stack(self._gaps, dim=1).clamp(max=UNSAYABLE).tolist()
        return [[round(gap, 4) for gap in row[:length]] for row, length in zip(table, lengths, strict=True)]
