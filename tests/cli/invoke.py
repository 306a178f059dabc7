"""Calls the command line inside the test process: seconds of imports are paid once instead of per call."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

from lmmhooks.cli.app import main


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


def invoke(*arguments: str) -> Outcome:
    """Run ``lmmhooks *arguments`` and return exit status and both streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit_:
            return Outcome(int(exit_.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main() returned instead of exiting")
