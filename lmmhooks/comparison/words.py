"""Words of an answer: which tokens make up one, and questions that are answered with yes or no."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lmmhooks.inspect.maps.words import group_words

__all__ = ["word_groups", "yes_no"]


def word_groups(texts: Sequence[str]) -> list[list[int]]:
    """
    Consecutive tokens that make up a word, or a run of punctuation; special tokens stand alone.

    Parameters
    ----------
    texts
        What every token adds to the text.
    """
    groups = [list(word.tokens) for word in group_words(texts)]
    known = {place for group in groups for place in group}
    return sorted([*groups, *([place] for place in range(len(texts)) if place not in known)])


def yes_no(answers: Sequence[str], tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """
    Tokens with which the answers Yes and No may begin, upper or lower case, with and without a space before them.

    Parameters
    ----------
    answers
        Those that were given.
    tokenizer
        Of the model.

    Returns
    -------
    tuple of list of int, or None
        None if no answer begins with one of the words.
    """
    if not any(re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) for text in answers):
        return None
    yes, no = (_first_tokens(word, tokenizer) for word in ("yes", "no"))
    # A tokenizer may begin both with the same token, such as a space.
    return (yes, no) if yes and no and not set(yes) & set(no) else None


def _first_tokens(word: str, tokenizer: Any) -> list[int]:
    forms = [text for form in (word.capitalize(), word) for text in (form, f" {form}")]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in forms]
    known = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
    return list(dict.fromkeys(known))
