"""``lmmhooks methods [NAME]``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lmmhooks.cli.output import JsonOption, console, note, print_json, print_table

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Method to describe; unset: list all.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only one kind: attention, reduction, decoding, refinement.")] = None,
    json: JsonOption = False,
) -> None:
    """List methods, or describe one: what it does, paper, code, settings with defaults, where it was tested."""
    from lmmhooks.cli.catalogue import describe_methods, support_matrix
    from lmmhooks.errors import MethodError, closest
    from lmmhooks.methods.registry import all_methods, broken_entry_points

    wanted = all_methods(kind)
    described = {key: value for key, value in describe_methods().items() if key in wanted}
    support = support_matrix()
    broken = broken_entry_points()
    if name is not None:
        if name not in described:
            reason = f" is installed but failed to import: {broken[name]}" if name in broken else " is unknown"
            raise MethodError(f"method {name!r}{reason}{closest(name, described)}; known: {', '.join(described)}")
        details = {"id": name, **described[name], "support": support.get(name, {})}
        if json:
            print_json(details)
        else:
            _print_method(details)
        return
    if json:
        listed = {key: {**value, "support": support.get(key, {})} for key, value in described.items()}
        print_json({"methods": listed, "failed": broken})
    else:
        rows = [[key, each["kind"], each["summary"], each["paper"]] for key, each in described.items()]
        print_table(["method", "kind", "what it does", "paper"], rows)
    for plugin, reason in broken.items():
        note(f"warning: method {plugin!r} is installed but failed to import: {reason}")


def _print_method(details: dict[str, Any]) -> None:
    out = console()
    out.print(f"{details['id']} ({details['kind']})\n\n{details['about']}\n", markup=False)
    for label, value in (("paper", details["paper"]), ("code", details["code"]), ("source", details["source"])):
        if value:
            out.print(f"{label}: {value}", markup=False)
    if details["settings"]:
        out.print()
        rows = [
            [key, "required" if each["required"] else repr(each["default"]), each["help"]]
            for key, each in details["settings"].items()
        ]
        print_table(["setting", "default", "meaning"], rows)
    for key, moment in details["measured_on_the_checkpoint"].items():
        how = "when a model is wrapped" if moment == "wrap" else f"with `lmmhooks calibrate {details['id']}`"
        out.print(f"measured on the checkpoint: {key}, {how}", markup=False)
    for preset, values in details["presets"].items():
        given = ", ".join(f"{key}={value!r}" for key, value in values.items())
        out.print(f"preset {preset}: {given}", markup=False)
    if details["support"]:
        out.print()
        families = [[family, _situations(results)] for family, results in details["support"].items()]
        print_table(["family", "tested"], families)


def _situations(results: Any) -> str:
    return ", ".join(f"{name}: {result}" for name, result in results.items())
