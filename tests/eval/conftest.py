"""Fixtures of the harness tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tests.eval.untrained`."""
    from tests.eval.untrained import export_untrained

    return export_untrained(tmp_path_factory.mktemp("untrained") / "tiny-llava")
