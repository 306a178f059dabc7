"""The report on the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lmmhooks_eval.report.tables import Table, cost_table, headline, notes, paper_table, steps_table
from lmmhooks_eval.report.view import RunView

__all__ = ["print_report", "rich_table"]

_STYLES = {"": "", "good": "bold green", "bad": "bold red"}


def rich_table(table: Table) -> RichTable:
    """A table for `rich`; cells are text and never markup, since they hold names that users chose."""
    drawn = RichTable(title=Text(table.title), title_justify="left", header_style="bold")
    for index, column in enumerate(table.columns):
        drawn.add_column(Text(column), justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, style=_STYLES[cell.tone]) for cell in row))
    return drawn


def print_report(console: Console, view: RunView) -> None:
    """Print the headline, paper, step and cost tables of every task, and how to read them."""
    for name, task in view.metrics["tasks"].items():
        console.print(rich_table(headline(name, task)))
        if (printed := paper_table(name, task)) is not None:
            console.print(rich_table(printed))
        if (steps := steps_table(name, task)) is not None:
            console.print(rich_table(steps))
        console.print(rich_table(cost_table(name, task)))
    for line in notes(view.metrics):
        console.print(Text(line, style="dim"))
