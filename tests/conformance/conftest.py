"""Collects which method runs on which family in which mode; ``--write-support FILE`` stores it for the docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


class Support:
    """``{method: {family: {mode: "yes" or the reason it is refused}}}``."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, dict[str, str]]] = {}

    def record(self, method: str, family: str, mode: str, outcome: str) -> None:
        self.cells.setdefault(method, {}).setdefault(family, {})[mode] = outcome


def pytest_addoption(parser):
    parser.addoption("--write-support", metavar="FILE", help="write the support matrix as JSON (run without -n)")


@pytest.fixture(scope="session")
def support(request):
    collected = Support()
    yield collected
    target = request.config.getoption("--write-support", None)
    if target and not request.session.testsfailed:
        Path(target).write_text(json.dumps(collected.cells, indent=1, sort_keys=True) + "\n")
