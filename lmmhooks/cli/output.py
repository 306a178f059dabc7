"""
What every command prints in the same way: JSON on standard output, tables for people, everything else on standard
error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JsonOption", "console", "note", "print_json", "print_table"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def print_json(data: Any) -> None:
    """Print data as indented JSON; nothing else may go to standard output in that case."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def console() -> Console:
    """The console for people, on standard output; as wide as the terminal, or wide enough for tables in a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def note(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"{text}\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table of texts; nothing in them is taken for markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        # The first column holds names that are typed again: whole, whatever the width.
        table.add_column(column, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)
