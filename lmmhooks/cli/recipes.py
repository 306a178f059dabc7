"""``lmmhooks recipes [NAME]``."""

from __future__ import annotations

from typing import Annotated

import typer

from lmmhooks.cli.output import JsonOption, print_json, print_table

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print; unset: list all.")] = None,
    json: JsonOption = False,
) -> None:
    """List the shipped recipes, or print one (a path works too)."""
    from lmmhooks_eval.recipes import find, load, shipped

    if name is not None:
        if json:
            print_json(load(name).model_dump(mode="json"))
        else:
            typer.echo(find(name).read_text(encoding="utf-8"), nl=False)
        return
    listed = {key: load(str(path)) for key, path in shipped().items()}
    if json:
        rows = {
            key: {
                "description": recipe.description,
                "model": recipe.model,
                "tasks": [plan.name for plan in recipe.tasks],
                "variants": list(recipe.variants),
            }
            for key, recipe in listed.items()
        }
        print_json(rows)
        return
    rows_shown = [
        [key, recipe.model, ", ".join(plan.name for plan in recipe.tasks), " ".join(recipe.description.split())]
        for key, recipe in listed.items()
    ]
    print_table(["recipe", "model", "tasks", "description"], rows_shown)
