"""A sheet of pictures: where every source of maps looks, on one question per size of object."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image as images

from lmmhooks_eval.localisation import CHANCE, Found, maps_of, question_of
from lmmhooks_eval.report.localisation import best_entries
from lmmhooks_eval.report.plots import STYLE

if TYPE_CHECKING:
    from lmmhooks.geometry import Box
    from lmmhooks_eval.task import Doc, Task

__all__ = ["contact_sheet", "shown_documents"]

_INCHES = 1.15


def shown_documents(task: Task, docs: Sequence[Doc]) -> list[Doc]:
    """The first question about a colour in every size band, in the order of the bands' objects: small ones first."""
    first: dict[str, Doc] = {}
    for doc in docs:
        if doc.get("type") == "colour" and task.target is not None and task.target(doc) is not None:
            first.setdefault(doc["size"], doc)

    def area(doc: Doc) -> float:
        assert task.target is not None
        box = task.target(doc)
        assert box is not None
        return (box[2] - box[0]) * (box[3] - box[1])

    return sorted(first.values(), key=area)


def contact_sheet(
    model: Any,
    processor: Any,
    task: Task,
    docs: Sequence[Doc],
    summary: Mapping[str, Any],
    methods: Mapping[str, str],
    path: Path,
) -> None:
    """
    Draw the sheet: a row per document of `shown_documents`, a column per source, at the layer that hits most often.

    Parameters
    ----------
    model, processor, methods
        As for `lmmhooks_eval.localisation.measure`.
    task, docs
        What was measured, or all documents of the same kind.
    summary
        As `lmmhooks_eval.localisation.summary` returns it.
    path
        PNG file to write.
    """
    best = {entry["source"]: entry["layer"] for entry in best_entries(summary) if entry["source"] != CHANCE}
    rows = shown_documents(task, docs)
    kinds = [source for source in best if source not in methods]
    with rc_context({**STYLE, "font.size": 7}):
        figure = Figure(figsize=(_INCHES * (1 + len(best)), _INCHES * len(rows) + 0.2), layout="constrained", dpi=110)
        axes = figure.subplots(len(rows), 1 + len(best), squeeze=False)
        for row, doc in enumerate(rows):
            assert task.target is not None
            [image], box = task.images(doc), task.target(doc)
            assert box is not None
            picture, question = image.convert("RGB"), question_of(task, doc)
            _draw(axes[row, 0], np.asarray(picture), box)
            axes[row, 0].set_title(question.replace(" in the image?", "?"), fontsize=6)
            found = {
                one.source: one
                for one in maps_of(model, processor, picture, question, methods, kinds)
                if best.get(one.source, -1) == one.layer
            }
            for column, (source, layer) in enumerate(best.items(), start=1):
                _draw(axes[row, column], _over(np.asarray(picture), found[source]), box)
                if row == 0:
                    axes[row, column].set_title(source if layer is None else f"{source}, layer {layer}", fontsize=6)
        drawn = io.BytesIO()
        figure.savefig(drawn)
    # A palette is enough for darkened pictures, and a quarter of the size.
    images.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)


def _over(picture: np.ndarray, found: Found) -> np.ndarray:
    """The picture, darker where the map is lower."""
    plane = found.geometry.plane(found.values, "nearest").nan_to_num(nan=0.0).numpy()
    low, high = float(plane.min()), float(plane.max())
    shares = (plane - low) / (high - low) if high > low else np.ones_like(plane)
    return (picture * (0.2 + 0.8 * shares[:, :, None])).astype(np.uint8)


def _draw(axes: Axes, pixels: np.ndarray, box: Box) -> None:
    axes.imshow(pixels)
    left, top, right, bottom = box
    margin = 4  # pixels: the outline must not cover what is inside
    axes.add_patch(
        Rectangle(
            (left - margin, top - margin),
            right - left + 2 * margin,
            bottom - top + 2 * margin,
            fill=False,
            edgecolor="#ff2d2d",
            linewidth=0.9,
        )
    )
    axes.set_axis_off()
