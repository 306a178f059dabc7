"""Normalisation of short answers."""

from __future__ import annotations

import pytest

from lmmhooks_eval.metrics.exact import normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two.", "2"),
        (" the red\ncar", "red"),
        ("A red car!", "red car"),
        ("**Yes**", "yes"),
        ("", ""),
        ("  \n ", ""),
        ("10", "10"),
        ("dark   blue", "dark blue"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
