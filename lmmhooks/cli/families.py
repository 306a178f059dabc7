"""``lmmhooks families [NAME]``."""

from __future__ import annotations

from typing import Annotated

import typer

from lmmhooks.cli.output import JsonOption, console, print_json, print_table

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def families(
    name: Annotated[str | None, typer.Argument(help="Model type to describe, e.g. llava; unset: list all.")] = None,
    json: JsonOption = False,
) -> None:
    """List model families with a module of their own, or describe one and the methods tested on it."""
    from lmmhooks.cli.catalogue import describe_families, support_matrix
    from lmmhooks.errors import ModelError, closest

    described = describe_families()
    support = support_matrix()
    tested = {family: [key for key, rows in support.items() if family in rows] for family in described}
    if name is not None:
        if name not in described:
            raise ModelError(
                f"no family for model type {name!r}{closest(name, described)}; known: {', '.join(described)}; "
                "a model of another type is resolved generically when it is wrapped, or refused with the reason"
            )
        details = {"model_type": name, **described[name], "methods": {key: support[key][name] for key in tested[name]}}
        if json:
            print_json(details)
            return
        console().print(f"{name}\n\n{details['about']}\n\nsource: {details['source']}", markup=False)
        if tested[name]:
            console().print(f"methods tested: {', '.join(tested[name])}", markup=False)
        return
    if json:
        print_json({key: {**each, "methods": tested[key]} for key, each in described.items()})
        return
    rows = [[key, each["summary"], str(len(tested[key]))] for key, each in described.items()]
    print_table(["model type", "what is special", "methods tested"], rows)
