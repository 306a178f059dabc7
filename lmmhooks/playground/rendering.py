"""What the page shows of an answer: pictures of where the model looks, and the cards beside each other, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from lmmhooks.comparison import Comparison, Run, Token
from lmmhooks.pages import data_uri, render
from lmmhooks.playground.session import Progress

__all__ = ["Heat", "cards", "cost_rows", "overlay", "problem"]

LEAST, MOST = 448, 896
"""Longer side of a picture, in pixels: small scenes are enlarged, so that cells can be told apart, photos shrink."""
OPACITY = 0.75
GREY = (128, 128, 128)
MIB = 1 << 20


@dataclass(frozen=True, eq=False)
class Heat:
    """
    Where the last row of a prompt looks: mean over layers and heads.

    Attributes
    ----------
    values
        ``[rows, columns]``; NaN where no token is.
    kept
        Bool of the same shape: whether a token that shows the cell reaches the last decoder layer.
    box
        Left, top, right and bottom of the grid in pixels of the image; may reach beyond it.
    """

    values: NDArray[np.float64]
    kept: NDArray[np.bool_]
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, run: Run) -> Heat | None:
        """For the first image of a run; None where its attention was not read or its grid is not known."""
        if run.along is None or not run.cells or run.cells[0] is None:
            return None
        cells, trace = run.cells[0], run.along
        values = cells.spread(trace.visual[0].nan_to_num(0.0).mean(dim=0))
        return cls(values.numpy(), cells.covered(trace.present[-1]).numpy(), cells.box)


def overlay(image: Image.Image, heat: Heat, top: float) -> Image.Image:
    """
    The image under the attention it gets.

    Parameters
    ----------
    image
        What was asked about.
    heat
        The attention.
    top
        Value of the brightest colour; the same for pictures that are compared.

    Returns
    -------
    PIL.Image.Image
        Cells whose token was removed are grey; what the model did not see, at the borders, stays as it is.
    """
    longest = max(image.size)
    scale = min(max(longest, LEAST), MOST) / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    left, above, right, below = (round(side * scale) for side in heat.box)
    extent = (max(1, right - left), max(1, below - above))

    shares = np.clip(np.nan_to_num(heat.values) / max(top, 1e-12), 0, 1).astype(np.float32)
    light = Image.new("F", size)
    light.paste(Image.fromarray(shares).resize(extent, Image.Resampling.BILINEAR), (left, above))
    smooth = np.asarray(light)
    colours = np.asarray(colormaps["inferno"](smooth))[..., :3] * 255
    # Where nothing is looked at the picture stays as it is.
    alpha = OPACITY * smooth[..., None]
    base = np.asarray(image.resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
    mixed = Image.fromarray((base * (1 - alpha) + colours * alpha).round().astype(np.uint8))

    visible = Image.new("L", size, 255)
    cells = Image.fromarray(heat.kept.astype(np.uint8) * 255)
    visible.paste(cells.resize(extent, Image.Resampling.NEAREST), (left, above))
    return Image.composite(mixed, Image.blend(mixed, Image.new("RGB", size, GREY), 0.8), visible)


@dataclass(frozen=True)
class _Card:
    """One answer as the template takes it."""

    title: str
    text: str
    tokens: Sequence[Token] = ()
    picture: str | None = None
    looked_at: Sequence[str] = ()
    note: str = ""
    differs: bool = False


def cards(progress: Progress, methods: str) -> str:
    """
    The answers so far, side by side; with pictures, token probabilities and cost once they are complete.

    Parameters
    ----------
    progress
        How far the question is.
    methods
        The composition that was asked for; text of the user, which is escaped like all other text.
    """
    comparison = progress.comparison
    if comparison is None:
        note = "stopped" if progress.stopped else ""
        answers = (("baseline", progress.baseline), (methods, progress.patched))
        shown = [_Card(title, text, note=note) for title, text in answers]
        return render("playground.html.j2", cards=shown, cost=None, waiting=not progress.stopped, problem=None)
    heats = [Heat.of(run) for run in comparison.runs]
    top = _top(heats)
    shown = []
    for run, heat in zip(comparison.runs, heats, strict=True):
        seen = None if heat is None or comparison.image is None else overlay(comparison.image, heat, top)
        shown.append(
            _Card(
                title=run.name,
                text=run.text,
                tokens=run.tokens,
                picture=None if seen is None else data_uri(seen),
                looked_at=[data_uri(each) for each in run.looked_at],
                note=run.note,
                differs=run.text != comparison.baseline.text,
            )
        )
    return render("playground.html.j2", cards=shown, cost=cost_rows(comparison), waiting=False, problem=None)


def problem(text: str) -> str:
    """One sentence on what went wrong."""
    return render("playground.html.j2", cards=(), cost=None, waiting=False, problem=text)


def cost_rows(comparison: Comparison) -> list[list[str]]:
    """One row per answer: name, visual tokens per layer, FLOPs against the baseline, cache, prompts read, times."""
    base = comparison.baseline.stats
    rows = []
    for run in comparison.runs:
        stats = run.stats
        rows.append(
            [
                run.name,
                f"{stats.average_visual:.1f}",
                f"{stats.prefill_flops / base.prefill_flops:.2f}" if base.prefill_flops else "-",
                f"{stats.kv_bytes / MIB:.2f} MiB",
                str(run.passes),
                f"{run.first_token_ms:.0f} ms",
                f"{run.total_ms:.0f} ms",
            ]
        )
    return rows


def _top(heats: Sequence[Heat | None]) -> float:
    """99th percentile of the attention in all pictures, so that a sink does not leave everything else dark."""
    values = [heat.values[np.isfinite(heat.values)] for heat in heats if heat is not None]
    return float(np.percentile(np.concatenate(values), 99)) if values else 0.0
