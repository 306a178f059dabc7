"""Words of an answer: which of its tokens belong together, and which words carry meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmmhooks.methods.words import listed_words

__all__ = ["Word", "content_of", "group_words", "merge_words"]


@dataclass(frozen=True)
class Word:
    """
    A word of an answer, or a run of punctuation.

    Attributes
    ----------
    text
        Without the space before it.
    tokens
        Places of its tokens in the answer, ascending.
    is_content
        No function word and no punctuation.
    """

    text: str
    tokens: tuple[int, ...]
    is_content: bool


def group_words(texts: Sequence[str]) -> tuple[Word, ...]:
    """
    Tokens joined to words.

    Parameters
    ----------
    texts
        What each token adds to the text, spaces included; nothing for special tokens, which belong to no word.

    Returns
    -------
    tuple of Word
        In order. A token that spans several words belongs to the first that it holds a character of.
    """
    text = "".join(texts)
    content = set(listed_words(text))
    owners: list[tuple[int, int]] = [match.span() for match in re.finditer(r"(?:[^\W_]|\ufffd)+|[^\w\s]+|_+", text)]
    members: dict[tuple[int, int], list[int]] = {span: [] for span in owners}
    start = 0
    for place, piece in enumerate(texts):
        stop = start + len(piece)
        owner = next((span for span in owners if span[0] < stop and start < span[1]), None)
        if owner is not None:
            members[owner].append(place)
        start = stop
    return tuple(
        Word(text[first:last], tuple(tokens), (first, last) in content)
        for (first, last), tokens in members.items()
        if tokens
    )


def merge_words(values: Tensor, words: Sequence[Word]) -> Tensor:
    """Mean over the tokens of each word: ``[T, ...]`` to ``[words, ...]``."""
    if not words:
        return values[:0]
    return torch.stack([values[list(word.tokens)].mean(dim=0) for word in words])


def content_of(words: Sequence[Word], num_tokens: int) -> tuple[int, ...]:
    """
    Tokens over which a map of the whole answer is averaged.

    The first token of every word that carries meaning: stop words, punctuation, special tokens and the tails of words
    that are several tokens are left out (RefAM's filter of stop words, carried over to answers; no evidence for
    language models is published, UNVERIFIED). All tokens of words where nothing carries meaning, as in "Yes.", and all
    tokens where there are no words.
    """
    heads = tuple(word.tokens[0] for word in words if word.is_content)
    return heads or tuple(place for word in words for place in word.tokens) or tuple(range(num_tokens))
