"""Settings of every test: offline, one share of the cores per worker, and deprecations as failures."""

from __future__ import annotations

import logging
import os

# Before anything imports huggingface_hub or torch, which read these once. Subprocesses of the CLI tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
if _workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # In the workers only: what the process that starts them sets, they inherit, and all of them would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(_workers))))


class DeprecationLogged(AssertionError):
    """transformers logged a deprecation: the call it names goes away in a coming release."""


class _FailOnDeprecation(logging.Handler):
    """Raises at the spot, so that the traceback shows which of our calls is outdated.

    transformers announces most deprecations with `logger.warning_once`, which `filterwarnings` never sees.
    """

    MARKS = ("deprecat", "will be removed in", "is no longer supported")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if any(mark in message.lower() for mark in self.MARKS):
            raise DeprecationLogged(f"{record.name}: {message}")


logging.getLogger("transformers").addHandler(_FailOnDeprecation(logging.WARNING))
