"""Errors a user can act on: one line each, naming the cause, what was given, what is possible and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "LmmhooksError",
    "MethodError",
    "ModelError",
    "PromptError",
    "closest",
]


class LmmhooksError(ValueError):
    """Base of every error that bad input causes; its text is one line and needs no traceback to be understood."""


class MethodError(LmmhooksError):
    """A method name, a hyper-parameter or a combination of methods that cannot be used."""


class ModelError(LmmhooksError):
    """A model that lacks something a method or the toolkit needs."""


class PromptError(LmmhooksError):
    """Inputs of a forward or generate call that do not fit the model or the method."""


def closest(name: str, known: Iterable[str]) -> str:
    """
    Suggestion for a mistyped name, as a clause ready to append to an error message.

    Parameters
    ----------
    name
        What the user wrote.
    known
        The names that exist.

    Returns
    -------
    str
        ``"; did you mean 'x'?"`` when something is similar, else the empty string.
    """
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""
