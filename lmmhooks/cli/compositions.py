"""Methods as the command line takes them: one option per variant, several methods of a variant joined by a plus."""

from __future__ import annotations

import re

from lmmhooks.errors import MethodError

__all__ = ["split_methods"]


def split_methods(text: str) -> list[str]:
    """
    Split a composition such as ``"fastv(keep=288) + var"`` into method specifications.

    Raises
    ------
    MethodError
        An empty part.
    """
    # A plus inside parentheses belongs to a setting.
    parts = [part.strip() for part in re.split(r"\+(?![^()]*\))", text)]
    if not all(parts):
        raise MethodError(f"method {text!r} has an empty part; write one method, or several joined by ' + '")
    return parts
