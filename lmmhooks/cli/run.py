"""``lmmhooks run RECIPE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmmhooks.cli.output import JsonOption, console, note, print_json

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe, or name of a shipped one (lmmhooks recipes).")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace a value, e.g. tasks.scenes-pope.limit=40; repeatable."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="About this many documents of every task.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; unset: runs/<recipe>-<time>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run; without --out the newest one of this recipe.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a recipe: baseline and patched variants on the same documents, in the same batches, then score and report."""
    from lmmhooks_eval import recipes
    from lmmhooks_eval.progress import BarProgress
    from lmmhooks_eval.report import load_view, print_report, write_html
    from lmmhooks_eval.runner import run as run_recipe
    from lmmhooks_eval.store import REPORT, default_folder

    loaded = recipes.load(recipe, overrides or ())
    if limit is not None:
        tasks = [plan.model_copy(update={"limit": limit}) for plan in loaded.tasks]
        loaded = loaded.model_copy(update={"tasks": tasks})
    folder = out or default_folder(Path("runs"), loaded.name, resume=resume)
    note(f"{loaded.name}: {loaded.model}, {len(loaded.tasks)} tasks, baseline and {len(loaded.variants)} variants")
    run_recipe(loaded, folder, resume=resume, progress=BarProgress())
    view = load_view(folder)
    page = write_html([view], folder / REPORT)
    if json:
        print_json({**view.metrics, "run": str(folder), "report": str(page)})
    else:
        print_report(console(), view)
    note(f"answers and figures: {folder}\nreport: {page}")
    for problem in view.metrics["problems"]:
        note(f"error: {problem}")
    if view.metrics["problems"]:
        raise typer.Exit(1)
