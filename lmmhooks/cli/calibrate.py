"""``lmmhooks calibrate METHOD``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmmhooks.cli.output import JsonOption, note, print_json

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def calibrate(
    method: Annotated[str, typer.Argument(help="Method to calibrate, with settings if need be: 'act(beta=0.3)'.")],
    model: Annotated[str, typer.Option(help="Model to load: a bundled name, a folder or a hub id.")],
    task: Annotated[
        str | None,
        typer.Option(help="Task that decides (act: scenes-pope), holds demonstrations (vti) or prompts."),
    ] = None,
    demos: Annotated[
        str | None, typer.Option(help="vti: JSON lines of image, question, value, h_value instead of a task.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="About this many documents (act 900, yopo 100 ...).")] = None,
    margin: Annotated[
        float | None, typer.Option(help="act: keep heads that beat the unedited score by more than this (0).")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="yopo: attention on the image over all other, above which a head stays (0.07).")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="yopo: 'mean' of the ratios over documents (default), or 'vote' of documents.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="dyvte: divergence in nats up to which an exit counts as no change (0.003).")
    ] = None,
    first: Annotated[int | None, typer.Option(min=0, help="dyvte: first layer tried (5).")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="vti: masked copies per image (50).")] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="vti: share of masked patches (0.99).")] = None,
    grouping: Annotated[
        str | None, typer.Option(help="vti: groups of the visual component, 'released' (default) or 'token'.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts or image copies per forward.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the choice of documents and of the masks.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File of the record (.json); unset: the cache, where wrap looks for it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights; auto: as they were saved.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where the model goes; unset: CUDA if there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="Attention backend; unset: the model's own choice.")] = None,
    quantization: Annotated[str | None, typer.Option(help="bnb-4bit or bnb-8bit; unset: none.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure on a checkpoint what a method needs: heads (act, yopo), layers (shortv, dyvte), directions (vti) ..."""
    from lmmhooks.errors import LmmhooksError
    from lmmhooks.loading import load
    from lmmhooks.methods.registry import resolve
    from lmmhooks_eval.calibration import calibrate as measure
    from lmmhooks_eval.calibration import procedure_for
    from lmmhooks_eval.progress import BarProgress

    # Everything that can be refused without the model is refused before it is loaded.
    resolved = resolve(method)
    options = {
        "task": task,
        "demos": demos,
        "limit": limit,
        "margin": margin,
        "threshold": threshold,
        "rule": rule,
        "eta": eta,
        "first": first,
        "trials": trials,
        "mask_ratio": mask_ratio,
        "grouping": grouping,
        "batch_size": batch_size,
        "seed": seed,
    }
    name, _ = procedure_for(resolved, options)
    if out is not None and out.suffix != ".json":
        raise LmmhooksError(f"--out {out} does not end in .json, by which methods know a record; rename it")
    loaded, processor = load(model, dtype=dtype, device=device, attn_implementation=backend, quantization=quantization)
    record, path = measure(resolved, loaded, processor, options, out, BarProgress())
    if json:
        print_json({**record.plain(), "file": str(path)})
    else:
        typer.echo(f"{record.method}, {name}: {record.evidence['summary']}")
    note(f"written to {path}")
    if record.evidence.get("documents_are_benchmark"):
        note(
            f"warning: these {len(record.evidence['documents'])} documents are part of the benchmark; a score on them "
            "is not a test. The record lists them"
        )
    if not record.value:
        note(f"warning: nothing was found, so wrap will refuse {record.method} without {name}")
