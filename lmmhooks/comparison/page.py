"""The page of a comparison: what its template needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks.comparison.explorer import explorer
from lmmhooks.comparison.figures import charts, cost_table, headline, remarks, stacks, token_tables
from lmmhooks.pages import picture_uri, write_page

if TYPE_CHECKING:
    from os import PathLike

    from lmmhooks.comparison.result import Comparison

__all__ = ["view", "write"]


def write(comparison: Comparison, path: str | PathLike[str]) -> Path:
    """Write the page of a comparison."""
    return write_page("comparison.html.j2", path, **view(comparison))


def view(comparison: Comparison) -> dict[str, Any]:
    """Values of the template, and of any other that shows a comparison beside something else."""
    data = explorer(comparison)
    return {
        "comparison": comparison,
        "explorer": data,
        "headline": headline(comparison),
        "stacks": stacks(comparison),
        "curves": charts(comparison),
        "remarks": remarks(comparison),
        "token_tables": token_tables(comparison),
        "cost": cost_table(comparison),
        # Without an explorer nothing else shows what was asked about.
        "pictures": [] if data is not None else [picture_uri(image) for image in comparison.images],
        "refined": [
            (run.name, [picture_uri(image) for image in run.looked_at]) for run in comparison.runs if run.looked_at
        ],
    }
