"""
From an exception to one line on standard error and an exit status: 2 for bad input, 1 for what failed while running.
"""

from __future__ import annotations

import errno
import sys

__all__ = ["BAD_INPUT", "FAILED", "Interrupted", "explain", "report"]

FAILED, BAD_INPUT = 1, 2


class Interrupted(Exception):
    """The user pressed Ctrl-C; typer would turn the original into an exit without a word."""


def explain(error: BaseException) -> tuple[str, int]:
    """
    One line for an exception, and the exit status it deserves.

    Parameters
    ----------
    error
        Whatever a command raised.

    Returns
    -------
    tuple
        Cause and remedy without line breaks; 2 if the user's input caused it, else 1.
    """
    from lmmhooks.errors import LmmhooksError

    # Usage errors of the command line carry these two; typer brings its own copy of click in some releases, click
    # itself in others, so their classes are no common ground.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _line(error.format_message()), int(error.exit_code)
    if isinstance(error, LmmhooksError):
        return _line(str(error)), BAD_INPUT
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return "interrupted; a run keeps the answers it has, continue it with --resume", FAILED
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        status = BAD_INPUT if error.errno in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR) else FAILED
        return f"{error.strerror or _line(str(error))}{where}", status
    name = type(error).__name__
    # RunError and its kind are written for people; of anything else the type is the better half of the message.
    text = _line(str(error)) if name == "RunError" else f"{name}: {_line(str(error))}; --debug shows the traceback"
    return text, FAILED


def report(error: BaseException) -> int:
    """Print the line of an exception on standard error and return its exit status."""
    text, status = explain(error)
    # A help page that was asked for by giving no arguments comes as an exception whose text is empty or the page
    # itself.
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{error.format_message()}\n")  # type: ignore[attr-defined]
        return status
    sys.stderr.write(f"error: {text}\n")
    return status


def _line(text: str) -> str:
    return " ".join(text.split())
