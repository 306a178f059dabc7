"""The page of a sink diagnosis: what its template needs, worked out of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmmhooks.comparison.page import view
from lmmhooks.inspect.findings import layer_ranges
from lmmhooks.inspect.report import SEGMENTS, LayerSinks, Picture, SampleSinks, SinkReport, SinkToken
from lmmhooks.pages import Chart, chart, data_uri, write_page

if TYPE_CHECKING:
    from os import PathLike

    from lmmhooks.comparison import Comparison

__all__ = ["layer_rows", "write"]

MAX_ROWS = 60
"""Rows of the table of positions; the JSON has all of them."""

LAYER_COLUMNS = (
    "layer",
    "sinks: system",
    "image",
    "question",
    "attention: system",
    "image",
    "question",
    "on visual sinks, of image",
    "heads on image",
    "top @ position, channel",
    "median",
)


def write(report: SinkReport, path: str | PathLike[str], answer: Comparison | None = None) -> Path:
    """
    Write the page of a report.

    Parameters
    ----------
    report
        Of the prompt.
    path
        Of the file.
    answer
        What the model answers and where it looks meanwhile, to be shown above the sinks.
    """
    samples = [
        {
            "sample": sample,
            "charts": _charts(sample),
            "overlays": [_overlay(picture, sample) for picture in report.pictures if picture.sample == sample.sample],
            "layers": layer_rows(sample),
            "positions": _positions(sample)[:MAX_ROWS],
            "left_out": max(0, len(_positions(sample)) - MAX_ROWS),
        }
        for sample in report.samples
    ]
    shown = {} if answer is None else view(answer)
    values = {"report": report, "samples": samples, "columns": LAYER_COLUMNS, "answer": answer is not None}
    return write_page("sinks.html.j2", path, **shown, **values)


def layer_rows(sample: SampleSinks) -> list[list[str]]:
    """One row per layer under `LAYER_COLUMNS`; a dash where there is nothing to say."""
    return [
        [
            str(layer.layer),
            *(str(layer.counts.get(name) or "-") for name in SEGMENTS),
            *(f"{layer.mass[name]:.3f}" if sample.segments[name] else "-" for name in SEGMENTS),
            _number(layer.visual_sink_share, ".3f"),
            _number(layer.image_centric_heads, ".1f"),
            _activation(layer),
            f"{layer.median:.3g}",
        ]
        for layer in sample.layers
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _activation(layer: LayerSinks) -> str:
    largest = layer.top[0]
    return f"{largest.value:.4g} @ {largest.position}, {largest.channel}"


def _charts(sample: SampleSinks) -> list[Chart]:
    layers = sample.layers
    present = [name for name in SEGMENTS if sample.segments[name]]
    found = [
        chart("Attention by segment", {name: [layer.mass[name] for layer in layers] for name in present}),
        chart(
            "Attention on sinks",
            {
                "text sinks": [layer.sink_mass.get("text") for layer in layers],
                "visual sinks": [layer.sink_mass.get("visual") for layer in layers],
                "visual sinks, of the image's": [layer.visual_sink_share for layer in layers],
            },
        ),
        chart(
            "Largest activations and median",
            {
                **{f"top {i + 1}": [_magnitude(layer, i) for layer in layers] for i in range(3)},
                "median": [layer.median for layer in layers],
            },
            log=True,
        ),
        chart(
            "Squared cosine to the first token",
            {name: [layer.cosine.get(name) for layer in layers] for name in present},
        ),
        chart("Heads that look at the image", {"heads": [layer.image_centric_heads for layer in layers]}),
    ]
    return [each for each in found if each is not None]


def _magnitude(layer: LayerSinks, rank: int) -> float | None:
    return abs(layer.top[rank].value) if rank < len(layer.top) else None


@dataclass(frozen=True)
class _Mark:
    """A cell that is marked: a sink in some layers (filled by their share), or an outlier of the encoder (ringed)."""

    row: int
    column: int
    opacity: float
    title: str
    outlier: bool


@dataclass(frozen=True)
class _Overlay:
    image: int
    crop: int
    uri: str
    rows: int
    columns: int
    marks: tuple[_Mark, ...]


def _overlay(picture: Picture, sample: SampleSinks) -> _Overlay:
    judged = sum(layer.judged for layer in sample.layers)
    cells: dict[tuple[int, int], tuple[SinkToken, list[int]]] = {}
    for layer in sample.layers:
        for token in layer.sinks:
            if (token.image, token.crop) == (picture.image, picture.crop):
                assert token.row is not None
                assert token.column is not None
                cells.setdefault((token.row, token.column), (token, []))[1].append(layer.layer)
    marks = [
        _Mark(row, column, 0.25 + 0.6 * len(layers) / judged, _titled(token.position, layers), outlier=False)
        for (row, column), (token, layers) in cells.items()
    ]
    for image in sample.images or ():
        marks += [
            _Mark(o.row, o.column, 1.0, f"position {o.position}: feature norm {o.norm:.1f}", outlier=True)
            for o in image.outliers
            if (image.image, o.crop) == (picture.image, picture.crop)
        ]
    rows, columns = picture.grid
    return _Overlay(picture.image, picture.crop, data_uri(picture.pixels), rows, columns, tuple(marks))


def _titled(position: int, layers: Sequence[int]) -> str:
    return f"position {position}: sink in layers {layer_ranges(layers)}"


def _positions(sample: SampleSinks) -> list[list[str]]:
    """One row per position and label over all layers, strongest evidence first."""
    found: dict[tuple[int, str], list[tuple[int, SinkToken]]] = {}
    for layer in sample.layers:
        for token in layer.tokens:
            found.setdefault((token.position, token.label), []).append((layer.layer, token))
    order = ("sink", "unconfirmed", "attention only")
    rows = []
    for (position, label), seen in sorted(found.items(), key=lambda item: (order.index(item[0][1]), item[0][0])):
        tokens = [token for _, token in seen]
        spoke = sorted({name for token in tokens for name in token.detectors})
        largest = max(tokens, key=lambda token: token.peak)
        received = [token.received for token in tokens if token.received is not None]
        rows.append(
            [
                str(position),
                _what(tokens[0]),
                label,
                layer_ranges(layer for layer, _ in seen),
                " ".join(spoke),
                f"{max(token.score for token in tokens):.1f}",
                f"{largest.peak:.4g} ({largest.channel})",
                f"{max(received):.3f}" if received else "-",
                f"{max(token.cosine for token in tokens):.2f}",
                _least([token.value_ratio for token in tokens]),
                _least([token.contribution_ratio for token in tokens]),
            ]
        )
    return rows


def _what(token: SinkToken) -> str:
    if token.image is None:
        return token.segment if token.text is None else f"{token.text!r} ({token.segment})"
    if token.row is None or token.row < 0:
        return f"image {token.image}"
    crop = f", crop {token.crop}" if token.crop else ""
    return f"image {token.image}{crop}, row {token.row}, column {token.column}"


def _least(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.2f}" if known else "-"
