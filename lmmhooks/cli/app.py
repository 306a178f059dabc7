"""
The ``lmmhooks`` command: a group whose commands are imported only when they are called.

``lmmhooks --help`` imports neither torch nor transformers, which is why the summaries of the commands stand here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from lmmhooks.cli.errors import Interrupted, report

__all__ = ["COMMANDS", "LazyCommand", "main"]


class LazyCommand(NamedTuple):
    """
    A command that is not imported yet: its module, which holds a `typer.Typer` named ``app``, and one line of help.
    """

    module: str
    summary: str


COMMANDS: Mapping[str, LazyCommand] = {
    "run": LazyCommand("lmmhooks.cli.run", "Run a recipe: baseline and patched variants on the same documents."),
    "compare": LazyCommand("lmmhooks.cli.compare", "Compare methods on one image and prompt."),
    "inspect": LazyCommand("lmmhooks.cli.inspect", "Show sinks, maps and visual attention share of a model."),
    "playground": LazyCommand("lmmhooks.cli.playground", "Ask a model in the browser, as it is and under methods."),
    "bench": LazyCommand(
        "lmmhooks.cli.bench", "Measure prefill, decoding and memory against the baseline and the limit."
    ),
    "calibrate": LazyCommand("lmmhooks.cli.calibrate", "Measure on a checkpoint what some methods need, and keep it."),
    "score": LazyCommand("lmmhooks.cli.score", "Score the stored answers of a run again, without a model."),
    "report": LazyCommand("lmmhooks.cli.report", "Tables, paired statistics and plots of one or several runs."),
    "methods": LazyCommand("lmmhooks.cli.methods", "List methods with papers, settings and defaults."),
    "families": LazyCommand("lmmhooks.cli.families", "List the model families that are supported."),
    "tasks": LazyCommand("lmmhooks.cli.tasks", "List tasks with prompts, parsers and metrics."),
    "recipes": LazyCommand("lmmhooks.cli.recipes", "List recipes, or print one."),
    "doctor": LazyCommand(
        "lmmhooks.cli.doctor", "Show versions, devices and attention backends, and what would be used."
    ),
}


class LazyGroup(TyperGroup):
    """A typer group that looks commands up in `COMMANDS`; one whose module does not exist is not offered."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, in the order of the table."""
        return [name for name, command in COMMANDS.items() if find_spec(command.module) is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command's module and build the command; None for an unknown name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = typer.main.get_command(import_module(COMMANDS[cmd_name].module).app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the base class, which suggests the nearest of ``self.commands``; that table is empty here."""
        names = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in names:
            from lmmhooks.errors import closest

            ctx.fail(f"no command {args[0]!r}{closest(args[0], names)}; commands: {', '.join(names)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interruption comes out as an exception that `report` has a line for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write names and summaries without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].summary) for name in self.list_commands(ctx)])


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `main` turns exceptions into one line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lmmhooks import __version__

        typer.echo(f"lmmhooks {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")] = False,
) -> None:
    """Attention redistribution, visual token reduction and contrastive decoding for multimodal transformers."""


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command line and exit: 0 on success, 1 for a failed run, 2 for bad input.

    Parameters
    ----------
    arguments
        Without the program's name; None for those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        status = app([each for each in given if each != "--debug"], prog_name="lmmhooks", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        sys.exit(report(error))
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
