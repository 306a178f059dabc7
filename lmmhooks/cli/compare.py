"""``lmmhooks compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmmhooks.cli.output import JsonOption, console, note, print_json, print_table

if TYPE_CHECKING:
    from lmmhooks.comparison import Comparison

app = typer.Typer(rich_markup_mode=None, add_completion=False)

MIB = 1 << 20


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="Model to load: a bundled name, a folder or a hub id.")],
    prompt: Annotated[str, typer.Option(help="The question; the model's chat template is applied.")],
    method: Annotated[
        list[str], typer.Option(help="Variant to compare, e.g. 'fastv(keep=32)'; compose with ' + '; repeatable.")
    ],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeatable for several images.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="Type of the weights; auto: as they were saved.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where the model goes; unset: CUDA if there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="Attention backend; unset: the model's own choice.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with answers, attention maps and cost.")] = None,
    json: JsonOption = False,
) -> None:
    """Answer one prompt as the model is and under each variant: texts, probabilities, where it looks, cost."""
    from lmmhooks.cli.compositions import split_methods
    from lmmhooks.comparison import compare as run_comparison
    from lmmhooks.loading import load
    from lmmhooks.methods.registry import resolve
    from lmmhooks.prompting import open_image

    # Everything that can be refused without the model is refused before it is loaded.
    variants = [[resolve(part) for part in split_methods(text)] for text in method]
    images = [open_image(path) for path in image or ()]
    loaded, processor = load(model, dtype=dtype, device=device, attn_implementation=backend)
    comparison = run_comparison(loaded, processor, images, prompt, variants, max_new_tokens=max_new_tokens)
    if json:
        print_json(comparison.to_dict())
    else:
        _print(comparison)
    if html is not None:
        note(f"written to {comparison.to_html(html)}")


def _print(comparison: Comparison) -> None:
    base = comparison.baseline.stats
    rows = []
    for run in comparison.runs:
        stats = run.stats
        sure = min((token.probability for token in run.tokens), default=None)
        rows.append(
            [
                run.name,
                run.text or "(empty)",
                "-" if sure is None else f"{sure:.3f}",
                f"{sum(run.visual_share) / len(run.visual_share):.3f}" if run.visual_share else "-",
                f"{stats.average_visual:.1f}",
                f"{stats.prefill_flops / base.prefill_flops:.3f}",
                f"{stats.kv_bytes / MIB:.2f} MiB",
                "-" if run.first_token_ms is None else f"{run.first_token_ms:.0f} ms",
                f"{run.total_ms:.0f} ms",
            ]
        )
    header = ["variant", "answer", "least sure token", "visual attention", "visual tokens per layer"]
    print_table([*header, "FLOPs (theory)", "KV cache", "first token", "total"], rows)
    console().print("\ntimes are of a single run each; `lmmhooks bench` measures", markup=False)
