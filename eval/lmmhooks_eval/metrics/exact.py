"""Exact match of short answers after the least normalisation that makes ``Two.`` and ``2`` the same answer."""

from __future__ import annotations

import re

__all__ = ["normalise"]

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def normalise(text: str) -> str:
    """
    First line, lower case, punctuation at the ends removed, single spaces, articles dropped, number words up to ten
    as digits.

    Parameters
    ----------
    text
        A raw answer.

    Returns
    -------
    str
        The form answers are compared in; empty for an empty answer.
    """
    line = next((line for line in text.strip().splitlines()), "").lower()
    words = re.sub(r"^\W+|\W+$", "", line).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))
