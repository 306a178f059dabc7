"""Self-contained HTML pages from the templates of this package: escaped text, nothing from the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks.errors import LmmhooksError

if TYPE_CHECKING:
    from os import PathLike

    from PIL import Image

__all__ = ["Areas", "Chart", "areas", "chart", "data_uri", "picture_uri", "render", "write_page"]


def render(template: str, **values: Any) -> str:
    """A template of ``lmmhooks/templates`` filled in; every text among the values is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("lmmhooks", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**values)


def write_page(template: str, path: str | PathLike[str], **values: Any) -> Path:
    """
    Render a template of ``lmmhooks/templates`` to a file.

    Raises
    ------
    LmmhooksError
        The file cannot be written.
    """
    page = render(template, **values)
    target = Path(path)
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise LmmhooksError(f"cannot write {str(target)!r}: {error.strerror}; choose another place") from None
    return target


def data_uri(image: Image.Image) -> str:
    """The image as PNG inside a URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_uri(image: Image.Image, side: int = 1024, most: int = 250_000) -> str:
    """
    The image for looking at, as a URI: scaled down to ``side`` pixels; PNG up to ``most`` bytes, JPEG beyond.

    Parameters
    ----------
    image
        RGB.
    side
        Most pixels along either side.
    most
        Most bytes of a PNG file; a photograph as PNG would be several times as large as anything else on a page.
    """
    shown = image.copy()
    shown.thumbnail((side, side))
    buffer, kind = io.BytesIO(), "png"
    shown.save(buffer, format="PNG")
    if buffer.tell() > most:
        buffer, kind = io.BytesIO(), "jpeg"
        shown.save(buffer, format="JPEG", quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Chart:
    """
    Curves over layers or tokens, in the coordinates of an SVG of 100 by 50 units, the origin at the upper left.

    Attributes
    ----------
    title
        Above the curves.
    curves
        By name, runs of points ``(x, y, layer, value)``; a run ends where values are missing.
    ticks
        Values on the vertical axis, as (y, text).
    layers
        First and last place on the horizontal axis.
    axis
        What the places are: ``"layer"`` or ``"token"``.
    zero
        Height of the value 0 if it lies between the ends of the axis, else None.
    steps
        Curves keep a value until the next place.
    tones
        Number of every curve's colour.
    """

    title: str
    curves: Mapping[str, Sequence[Sequence[tuple[float, float, int, float]]]]
    ticks: Sequence[tuple[float, str]]
    layers: tuple[int, int]
    axis: str = "layer"
    zero: float | None = None
    steps: bool = False
    tones: Mapping[str, int] = field(default_factory=dict)


def chart(
    title: str,
    series: Mapping[str, Sequence[float | None]],
    *,
    log: bool = False,
    axis: str = "layer",
    first: int = 0,
    steps: bool = False,
    names: Sequence[str] = (),
) -> Chart | None:
    """
    Curves of values per layer or token, or None if there is nothing to show: no value, or nothing but zeros.

    Parameters
    ----------
    title
        What is shown.
    series
        By name, one value per place; None where there is none.
    log
        Decades on the vertical axis instead of a range that includes 0; values must be positive, others are left out.
    axis, first
        What a place is called, and the number of the first.
    steps
        Draw steps instead of lines.
    names
        All that several charts show between them, so that each keeps its colour; empty: what this one shows.
    """
    from math import ceil, floor, log10

    kept = {
        name: [None if v is None or (log and v <= 0) else log10(v) if log else v for v in values]
        for name, values in series.items()
    }
    known = [v for values in kept.values() for v in values if v is not None]
    if not known or not (log or any(known)):
        return None
    bottom, top = (floor(min(known)), ceil(max(known))) if log else (min(0.0, *known), max(0.0, *known))
    span = (top - bottom) or 1.0
    count = max(len(values) for values in kept.values())

    def point(layer: int, v: float, value: float) -> tuple[float, float, int, float]:
        return 100 * layer / max(count - 1, 1), 50 - 50 * (v - bottom) / span, first + layer, value

    curves: dict[str, list[list[tuple[float, float, int, float]]]] = {}
    for name, values in kept.items():
        runs: list[list[tuple[float, float, int, float]]] = [[]]
        for layer, v in enumerate(values):
            if v is None:
                runs.append([])
            else:
                runs[-1].append(point(layer, v, 10**v if log else v))
        curves[name] = [run for run in runs if run]
    ticks = [(50.0, f"{10**bottom:g}" if log else f"{bottom:.3g}"), (0.0, f"{10**top:g}" if log else f"{top:.3g}")]
    zero = 50 + 50 * bottom / span if not log and bottom < 0 < top else None
    if zero is not None and 4 < zero < 46:
        ticks.append((zero, "0"))
    shown = {name: runs for name, runs in curves.items() if runs}
    tones = {name: tone for tone, name in enumerate(names or kept)}
    return Chart(title, shown, ticks, (first, first + count - 1), axis, zero, steps, tones)


@dataclass(frozen=True)
class Areas:
    """
    Shares of a whole per layer, stacked, in the coordinates of `Chart`.

    Attributes
    ----------
    title
        Above the areas.
    areas
        By name, the corners of a polygon ``(x, y)`` and its mean share.
    layers
        First and last layer.
    """

    title: str
    areas: Mapping[str, tuple[Sequence[tuple[float, float]], float]]
    layers: tuple[int, int]


def areas(title: str, series: Mapping[str, Sequence[float]]) -> Areas:
    """
    Stacked shares per layer, the first name at the bottom.

    Parameters
    ----------
    title
        What is shown.
    series
        By name, one share per layer; together they sum to 1 in every layer.
    """
    count = max(len(values) for values in series.values())
    # A single layer is drawn as wide as many.
    places = [100 * layer / max(count - 1, 1) for layer in range(count)] if count > 1 else [0.0, 100.0]
    below = [0.0] * len(places)
    stacked: dict[str, tuple[list[tuple[float, float]], float]] = {}
    for name, values in series.items():
        above = [low + value for low, value in zip(below, list(values) * (1 if count > 1 else 2), strict=True)]
        edge = [(x, 50 - 50 * y) for x, y in zip(places, above, strict=True)]
        back = [(x, 50 - 50 * y) for x, y in zip(reversed(places), reversed(below), strict=True)]
        stacked[name] = (edge + back, sum(values) / count)
        below = above
    return Areas(title, stacked, (0, count - 1))
