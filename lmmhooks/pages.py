"""Self-contained HTML pages from the templates of this package: escaped text, no script, nothing from the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmhooks.errors import LmmhooksError

if TYPE_CHECKING:
    from os import PathLike

    from PIL import Image

__all__ = ["Chart", "chart", "data_uri", "render", "write_page"]


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


@dataclass(frozen=True)
class Chart:
    """
    Curves over decoder layers, in the coordinates of an SVG of 100 by 50 units, the origin at the upper left.

    Attributes
    ----------
    title
        Above the curves.
    curves
        By name, runs of points ``(x, y, layer, value)``; a run ends where values are missing.
    ticks
        Values on the vertical axis, as (y, text).
    layers
        First and last layer.
    """

    title: str
    curves: Mapping[str, Sequence[Sequence[tuple[float, float, int, float]]]]
    ticks: Sequence[tuple[float, str]]
    layers: tuple[int, int]


def chart(title: str, series: Mapping[str, Sequence[float | None]], *, log: bool = False) -> Chart | None:
    """
    Curves of values per layer, or None if there is nothing to show: no value, or nothing but zeros.

    Parameters
    ----------
    title
        What is shown.
    series
        By name, one value per layer; None where there is none.
    log
        Decades on the vertical axis instead of a range that starts at 0; values must be positive, others are left out.
    """
    from math import ceil, floor, log10

    kept = {
        name: [None if v is None or (log and v <= 0) else log10(v) if log else v for v in values]
        for name, values in series.items()
    }
    known = [v for values in kept.values() for v in values if v is not None]
    if not known or not (log or any(known)):
        return None
    bottom, top = (floor(min(known)), ceil(max(known))) if log else (0.0, max(known))
    span = (top - bottom) or 1.0
    count = max(len(values) for values in kept.values())

    def point(layer: int, v: float, value: float) -> tuple[float, float, int, float]:
        return 100 * layer / max(count - 1, 1), 50 - 50 * (v - bottom) / span, layer, value

    curves: dict[str, list[list[tuple[float, float, int, float]]]] = {}
    for name, values in kept.items():
        runs: list[list[tuple[float, float, int, float]]] = [[]]
        for layer, v in enumerate(values):
            if v is None:
                runs.append([])
            else:
                runs[-1].append(point(layer, v, 10**v if log else v))
        curves[name] = [run for run in runs if run]
    ticks = [(50.0, f"{10**bottom:g}" if log else "0"), (0.0, f"{10**top:g}" if log else f"{top:.3g}")]
    return Chart(title, {name: runs for name, runs in curves.items() if runs}, ticks, (0, count - 1))
