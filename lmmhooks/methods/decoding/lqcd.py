"""
LQCD: push away from what the wording of the question suggests, by contrasting it with a neutral wording.

``(1 + alpha) L_neutral - alpha L_leading`` on tokens that are plausible under the neutral query. The query as typed is
the leading one; the main rows read its neutral version, and that is what ``generate`` continues. Rules make it
(opinions and tag questions go, `neutral.py`); both wordings are in ``patch.stats.notes``. A query in which nothing
leads is the neutral one itself, and the other branch gets `leading` behind it.

There is no public code. The contrast is that of secondary descriptions of the paper; the neutraliser (an LLM in the
paper's second version), the synthetic sentence and the scaling by sentiment are UNVERIFIED and made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmmhooks.methods.base import setting
from lmmhooks.methods.decoding.base import Branch, DecodingMethod
from lmmhooks.methods.decoding.context import BranchContext
from lmmhooks.methods.decoding.neutral import leading_spans, neutralised, strength
from lmmhooks.methods.decoding.prompts import Words, are_words, encode, insert, plain_words, question_span
from lmmhooks.methods.decoding.view import StepView
from lmmhooks.methods.words import token_texts

__all__ = ["Lqcd", "without_spans"]


def without_spans(texts: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """
    Which tokens stay when stretches of a text go: those with anything but blanks outside of them.

    Parameters
    ----------
    texts
        What each token adds to the text.
    spans
        First character and the one after the last of every stretch.
    """
    keep, start = [], 0
    for text in texts:
        stop = start + len(text)
        gone = {place for first, last in spans for place in range(max(first, start), min(last, stop))}
        left = [place for place in range(start, stop) if place not in gone and not text[place - start].isspace()]
        keep.append(not gone or bool(left))
        start = stop
    return keep


@dataclass(frozen=True)
class Lqcd(DecodingMethod):
    """Leading query contrastive decoding (see the module docstring)."""

    id: ClassVar[str] = "lqcd"
    paper: ClassVar[str] = (
        "Towards Analyzing and Mitigating Sycophancy in Large Vision-Language Models, arXiv 2408.11261"
    )

    alpha: float = setting(1.0, help="Strength of the contrast, 0 or more; 0: the neutral query alone. UNVERIFIED.")
    neutralise: bool = setting(
        True, help="Take leading wording out of the query by rules; False: the query as typed is the neutral one."
    )
    leading: Words = setting(
        " I think the answer is yes, right?",
        help="Put behind a neutral query to make a leading one: text (needs the processor), or token ids; empty: a "
        "neutral query is not contrasted. UNVERIFIED wording.",
    )
    sentiment: bool = setting(
        False,
        help="Scale alpha by how strongly the query leads, in [0, 1] by a list of cues (1: certainty, 0.7: opinion, "
        "0.5: tag question, 0: neutral, in which case nothing is contrasted). UNVERIFIED.",
    )
    lazy: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "leading", plain_words(self.leading))
        self._require(self.alpha >= 0, "alpha", "0 or more")
        self._require(are_words(self.leading), "leading", "text, or token ids")
        self._require(
            self.neutralise or not self.sentiment, "sentiment", "False where nothing is looked for (neutralise=False)"
        )

    @property
    def is_identity(self) -> bool:
        return not self.neutralise and self.beta == 0 and (self.alpha == 0 or not self.leading)

    @property
    def needs_tokenizer(self) -> bool:
        return self.neutralise or (self.alpha > 0 and isinstance(self.leading, str) and bool(self.leading))

    def main_branch(self, family: Any) -> Branch:
        return Branch("neutral", text="edited" if self.neutralise else "same")

    def branches(self, family: Any) -> list[Branch]:
        return [Branch("leading", text="edited")] if self.alpha else []

    def weights(self, main: Tensor, others: Sequence[Tensor], step: int, view: StepView) -> Sequence[float | Tensor]:
        alpha: float | Tensor = self.alpha
        # In controls, whose branches read the prompt as given, nothing was measured.
        if self.sentiment and "strengths" in view.memory:
            alpha = self.alpha * view.memory["strengths"].to(main)[:, None]
        return [1 + alpha, -alpha]

    def select_rows(self, rows: Tensor, memory: dict[Any, Any]) -> None:
        if "strengths" in memory:
            memory["strengths"] = memory["strengths"].index_select(0, rows.to(memory["strengths"].device))

    def edit_tokens(self, tokens: Tensor, branch: Branch, context: BranchContext) -> Tensor:
        is_main, strengths = branch.name == "neutral", context.memory.setdefault("strengths", torch.zeros(0))
        span = question_span(tokens, context)
        query = "" if span is None else self._query(tokens, span, context)
        if not is_main:  # rows come in order, each of them once in this branch
            context.memory["strengths"] = torch.cat([strengths, torch.tensor([strength(query)])])
        if span is None:  # a row without an image stays what it is
            return tokens
        leads = leading_spans(query)
        if not is_main:
            return tokens if leads else insert(tokens, span[1], encode(self.leading, context))
        leading = self.leading if isinstance(self.leading, str) else ""
        wordings = {"neutral": neutralised(query), "leading": query if leads else query + leading}
        context.notes.append({"row": context.index, **wordings})
        return self._neutral(tokens, span, query, leads, context) if leads else tokens

    def _query(self, tokens: Tensor, span: tuple[int, int], context: BranchContext) -> str:
        """The question as typed; empty where nothing is looked for in it."""
        return "".join(token_texts(context.tokenizer, tokens[slice(*span)].tolist())) if self.neutralise else ""

    def _neutral(
        self, tokens: Tensor, span: tuple[int, int], query: str, leads: list[tuple[int, int]], context: BranchContext
    ) -> Tensor:
        """The row with a neutral question, of the very tokens it was typed in where that is possible."""
        start, stop = span
        texts = token_texts(context.tokenizer, tokens[start:stop].tolist())
        keep = without_spans(texts, leads)
        left = "".join(text for text, kept in zip(texts, keep, strict=True) if kept)
        if left == neutralised(query):
            question = tokens[start:stop][torch.tensor(keep, device=tokens.device)]
        else:  # a token holds both what goes and what stays, the blank before a word say
            question = tokens.new_tensor(encode(neutralised(query), context))
        return torch.cat([tokens[:start], question, tokens[stop:]])
