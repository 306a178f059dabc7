"""
Errors of the harness: what bad input causes (exit status 2) and what a run that had begun dies of (exit status 1).
"""

from __future__ import annotations

from lmmhooks.errors import LmmhooksError

__all__ = ["RecipeError", "RunError", "StoreError", "TaskError"]


class RecipeError(LmmhooksError):
    """A recipe that cannot be found, read or understood."""


class TaskError(LmmhooksError):
    """An unknown task, prompt or parser, or benchmark data that are missing or malformed."""


class StoreError(LmmhooksError):
    """A run folder that cannot be used: not writable, not a run, or holding another run."""


class RunError(RuntimeError):
    """A run that began and could not go on; answers obtained before it are on disk."""
