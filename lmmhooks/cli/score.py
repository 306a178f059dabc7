"""``lmmhooks score RUN_DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmmhooks.cli.output import JsonOption, console, note, print_json

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def score(
    run_dir: Annotated[Path, typer.Argument(help="A run folder.")],
    json: JsonOption = False,
) -> None:
    """Score the stored answers of a run again and replace its metrics.json; needs no model."""
    from lmmhooks_eval.score import score_run

    metrics = score_run(run_dir)
    if json:
        print_json(metrics)
    else:
        from lmmhooks_eval.report.console import rich_table
        from lmmhooks_eval.report.tables import headline, metrics_table, paper_table

        for name, task in metrics["tasks"].items():
            for table in (headline(name, task), paper_table(name, task), metrics_table(name, task)):
                if table is not None:
                    console().print(rich_table(table))
    for problem in metrics["problems"]:
        note(f"error: {problem}")
    if metrics["problems"]:
        raise typer.Exit(1)
