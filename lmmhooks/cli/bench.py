"""``lmmhooks bench``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmmhooks.cli.output import JsonOption, console, note, print_json, print_table

if TYPE_CHECKING:
    from lmmhooks.bench.answers import AnswerCost
    from lmmhooks.bench.measure import VariantCost
    from lmmhooks.bench.timing import Spread

app = typer.Typer(rich_markup_mode=None, add_completion=False)

MIB = 1 << 20


@app.command()
def bench(
    model: Annotated[str | None, typer.Option(help="Model to load: a bundled name, a folder or a hub id.")] = None,
    config: Annotated[
        str | None, typer.Option(help="Named shape with random weights instead, e.g. llava-1.5-7b-shape.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method to measure, e.g. 'fastv(keep=288)'; compose with ' + '; repeatable."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of a named shape.")] = None,
    vision_layers: Annotated[int | None, typer.Option(min=1, help="Vision layers of a named shape.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=2, help="Text tokens per prompt.")] = 64,
    visual_tokens: Annotated[int | None, typer.Option(min=1, help="Visual tokens per prompt, where free.")] = None,
    decode_tokens: Annotated[int, typer.Option(min=0, help="Decode steps per round.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds that count; each runs all alternatives.")] = 7,
    image_side: Annotated[
        int, typer.Option(min=28, help="Side in pixels of the images of methods that look before they answer.")
    ] = 672,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; unset: float32 on CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; unset: CUDA if there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="Attention backend; unset: the model's own choice.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; unset: torch's own choice.")] = None,
    disabled: Annotated[bool, typer.Option(help="Also measure a wrapped but disabled model.")] = True,
    json: JsonOption = False,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
) -> None:
    """Measure methods against the plain model, in interleaved rounds: prefill, decode step, memory, and the limit."""
    import torch

    from lmmhooks.bench.answers import measure_answer
    from lmmhooks.bench.measure import measure_baseline, measure_disabled, measure_variant
    from lmmhooks.bench.options import load_target, resolve_device, resolve_dtype
    from lmmhooks.bench.processors import build_processor, question
    from lmmhooks.bench.prompts import make_prompt
    from lmmhooks.bench.record import check_writable, write_record
    from lmmhooks.cli.compositions import split_methods
    from lmmhooks.errors import LmmhooksError
    from lmmhooks.methods.registry import resolve
    from lmmhooks_eval.environment import describe

    if (model is None) == (config is None):
        raise LmmhooksError("give either --model (weights to load) or --config (a named shape), not both or neither")
    variants = [split_methods(text) for text in method or ()]
    if out is not None:
        check_writable(out)
    if threads is not None:
        torch.set_num_threads(threads)
    # Other work on the machine at the start; ratios bear it, times do not.
    load = os.getloadavg()[0]
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    target, processor = load_target(model, config, layers, vision_layers, kind, place, backend)
    prompt = make_prompt(target, batch=batch, text=text_tokens, visual=visual_tokens)
    note(f"{model or config}: {prompt.visual} visual and {prompt.text} text tokens, batch {batch}, {repeat} rounds")

    baseline = measure_baseline(target, prompt, repeat, decode_tokens)
    off = measure_disabled(target, prompt, variants[0], repeat, decode_tokens) if disabled and variants else None
    measured, answered = [], []
    for methods in variants:
        note(f"measuring {' + '.join(methods)}")
        if any(resolve(text).kind == "refinement" for text in methods):
            processor = processor or build_processor(target)
            asked, size = question(text_tokens), (image_side, image_side)
            answered.append(measure_answer(target, processor, methods, asked, size, repeat, max(decode_tokens, 1)))
        else:
            measured.append(measure_variant(target, prompt, methods, repeat, decode_tokens))

    record = {
        "kind": "bench",
        "environment": describe(target, {"name": str(model or config), "dtype": str(kind).removeprefix("torch.")}, {}),
        "attention": target.config.get_text_config()._attn_implementation,
        "decoder_layers": target.config.get_text_config().num_hidden_layers,
        "vision_layers": getattr(target.config.vision_config, "num_hidden_layers", None),
        "load_average": load,
        "batch": batch,
        "text_tokens": prompt.text,
        "visual_tokens": prompt.visual,
        "decode_tokens": decode_tokens,
        "repeat": repeat,
        "baseline": asdict(baseline),
        "disabled": None if off is None else {name: asdict(one) for name, one in off.items()},
        "variants": [asdict(variant) for variant in measured],
        "answers": [asdict(variant) for variant in answered],
        "image_side": image_side,
    }
    if out is not None:
        write_record(record, out)
        note(f"written to {out}")
    if json:
        print_json(record)
        return
    times = ", ".join(f"{name} {one.median:.1f} ms" for name, one in baseline.milliseconds.items())
    console().print(f"plain model: {times}, {baseline.peak_bytes / MIB:.0f} MiB beyond the weights", highlight=False)
    rows = [_row(variant) for variant in measured]
    if off is not None:
        rows.insert(0, ["wrapped, disabled", *(_ratio(off.get(name)) for name in COLUMNS), "-", "-", "-", "-"])
    if rows:
        header = ["method", *COLUMNS, "of native limit", "of two passes", "FLOPs (theory)", "memory"]
        print_table(header, rows)
        note("ratios to the plain model within each round: median [quartiles]; 'of native limit': decoder prefill")
    if answered:
        header = ["method", "answer", "of the plain model", "positions read", "images encoded"]
        print_table(header, [_answer(variant) for variant in answered])
        note(f"answers of {max(decode_tokens, 1)} tokens about images of {image_side} x {image_side} pixels")


COLUMNS = ("vision", "decoder", "prefill", "decode")


def _row(variant: VariantCost) -> list[str]:
    return [
        " + ".join(variant.methods),
        *(_ratio(variant.ratios.get(name)) for name in COLUMNS),
        _ratio(variant.over_limit),
        _ratio(variant.over_two_passes),
        f"{variant.flops_ratio:.3f}",
        f"{(variant.peak_bytes - variant.peak_bytes_plain) / MIB:+.1f} MiB",
    ]


def _answer(variant: AnswerCost) -> list[str]:
    return [
        " + ".join(variant.methods),
        f"{variant.milliseconds.median:.1f} ms",
        _ratio(variant.ratio),
        f"{variant.positions} ({variant.positions_plain})",
        f"{variant.encoded} ({variant.encoded_plain})",
    ]


def _ratio(value: Spread | Any) -> str:
    return "-" if value is None else f"{value.median:.3f} [{value.low:.3f}, {value.high:.3f}]"
