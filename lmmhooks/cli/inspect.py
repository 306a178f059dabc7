"""``lmmhooks inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmmhooks.cli.output import JsonOption, console, note, print_json, print_table

if TYPE_CHECKING:
    from lmmhooks.inspect.report import SinkReport

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Option(help="Model to load: a bundled name, a folder or a hub id.")],
    prompt: Annotated[str, typer.Option(help="The question; the model's chat template is applied.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeatable for several images.")] = None,
    sink_dims: Annotated[
        str | None, typer.Option(help="Channels of massive activations, e.g. '1415,2533'; unset: searched.")
    ] = None,
    probe_rows: Annotated[
        str, typer.Option(help="Read the attention of that many of the last text rows, or of 'all' rows.")
    ] = "32",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer; the model answers for --html and --json only.")
    ] = 64,
    dtype: Annotated[str, typer.Option(help="Type of the weights; auto: as they were saved.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where the model goes; unset: CUDA if there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="Attention backend; unset: the model's own choice.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page: maps of every answer token, sinks, curves.")] = None,
    json: JsonOption = False,
) -> None:
    """Find attention sinks on one prompt, and see where the model looks at every token of its answer."""
    from lmmhooks.comparison import compare
    from lmmhooks.inspect import sinks
    from lmmhooks.loading import load
    from lmmhooks.prompting import build_inputs, open_image

    # Everything that can be refused without the model is refused before it is loaded.
    images = [open_image(path) for path in image or ()]
    channels = None if sink_dims is None else _numbers("--sink-dims", sink_dims)
    rows = probe_rows if probe_rows == "all" else _numbers("--probe-rows", probe_rows)[0]
    loaded, processor = load(model, dtype=dtype, device=device, attn_implementation=backend)
    weight = next(loaded.parameters())
    inputs = build_inputs(processor, images, prompt, weight.device, weight.dtype)
    report = sinks(loaded, inputs, processor, sink_dims=channels, probe_rows=rows)  # type: ignore[arg-type]
    answer = None
    if json or html is not None:
        answer = compare(loaded, processor, images, prompt, [], max_new_tokens=max_new_tokens)
    if json and answer is not None:
        print_json({"sinks": report.to_dict(), "answer": answer.baseline.to_dict()})
    else:
        _print(report)
    if html is not None:
        note(f"written to {report.to_html(html, answer)}")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} is {text!r}; give whole numbers, such as 1415,2533") from None


def _print(report: SinkReport) -> None:
    from lmmhooks.inspect.page import LAYER_COLUMNS, layer_rows

    out = console()
    out.print(report.channels.sentence, markup=False)
    for sample in report.samples:
        for finding in sample.findings:
            out.print(f"- {finding}", markup=False)
        out.print()
        print_table(LAYER_COLUMNS, layer_rows(sample))
