"""Real data that lie beside a checkout; tests that need them skip where they are absent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared_file(name: str) -> Path:
    """A file of the shared data; skips the calling test where it is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data file shared/data/{name} is not beside this checkout")
    return path


def read_lines(name: str) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, compressed or not."""
    path = shared_file(name)
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
