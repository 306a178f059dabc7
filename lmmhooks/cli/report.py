"""``lmmhooks report RUN_DIR...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmmhooks.cli.output import JsonOption, console, note, print_json

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One or several run folders.")],
    html: Annotated[Path | None, typer.Option(help="Page to write; unset: report.html in a single run folder.")] = None,
    json: JsonOption = False,
) -> None:
    """Tables, paired statistics and plots of one or several runs, scored anew from their answers."""
    from lmmhooks_eval.report import load_view, print_report, write_html
    from lmmhooks_eval.store import REPORT

    views = [load_view(path) for path in run_dirs]
    page = html or (run_dirs[0] / REPORT if len(run_dirs) == 1 else None)
    if page is not None:
        write_html(views, page)
    if json:
        runs = [{**view.metrics, "run": str(view.path)} for view in views]
        print_json({"runs": runs, "report": None if page is None else str(page)})
    else:
        for view in views:
            console().rule(view.title, align="left")
            print_report(console(), view)
    if page is not None:
        note(f"report: {page}")
