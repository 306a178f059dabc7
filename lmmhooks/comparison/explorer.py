"""
Attention maps of a comparison as data for the script of its page.

Maps are stored as one byte per cell, on a square-root scale (small values keep their ratio), against one maximum per
image and group of layers that all variants share: equal values give equal bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmmhooks.comparison.measures import bands, mean_map
from lmmhooks.comparison.places import Cells
from lmmhooks.comparison.result import Comparison, Run, plain
from lmmhooks.comparison.trace import Trace
from lmmhooks.comparison.words import word_groups
from lmmhooks.inspect.maps.result import SPANS
from lmmhooks.pages import picture_uri

__all__ = ["ABSENT", "LEVELS", "explorer", "quantise"]

ABSENT = 255
"""Byte of a cell without a token."""
LEVELS = 254
"""Byte of the largest value."""
TOP = 0.99
"""The brightest colour stands for that quantile of what is compared, so that a single cell does not darken the rest."""

MAX_BANDS = 16
MAX_BYTES = 1_500_000
"""Of all maps together; base64 makes a third more of it. Layers are grouped into fewer bands where this is exceeded."""


@dataclass(frozen=True, eq=False)
class _Maps:
    """Maps of one trace on one image: ``[bands, T, rows, columns]``, NaN where no token is."""

    cells: Cells
    values: Tensor
    sinks: Tensor

    @property
    def without_sinks(self) -> Tensor:
        """Sinks set to zero, the rest scaled to the sum there was."""
        rest = self.values.masked_fill(self.sinks & ~self.values.isnan(), 0.0)
        total, left = (x.nansum(dim=(-2, -1), keepdim=True) for x in (self.values, rest))
        return rest * torch.where(left > 0, total / left, 0.0)


def explorer(comparison: Comparison) -> dict[str, Any] | None:
    """
    JSON-compatible data for the script; None if no variant was led along an answer.

    Returns
    -------
    dict
        ``layers``, ``bands`` (first and last layer of every group; the first group is all of them), ``images``,
        ``runs`` (with ``traces`` along the ``baseline`` and along their ``own`` answer), and per image and kind of
        trace the ``ranges`` of colours.
    """
    traced = [run for run in comparison.runs if run.along is not None]
    if not traced:
        return None
    assert traced[0].along is not None
    num_layers = traced[0].along.shares.shape[1]
    groups = _groups(comparison, num_layers)
    maps = {
        (r, kind, image): _maps(trace, cells, groups)
        for r, kind, trace in _traces(comparison)
        for image, cells in enumerate(comparison.runs[r].cells)
        if cells is not None
    }
    images = range(len(comparison.images))
    most = [
        [_most([m.values[b] for (_, _, i), m in maps.items() if i == image]) for b in range(len(groups))]
        for image in images
    ]
    return {
        "layers": num_layers,
        "bands": groups,
        "images": [
            {"uri": picture_uri(picture), "width": picture.width, "height": picture.height}
            for picture in comparison.images
        ],
        "most": most,
        "ranges": {
            kind: [[_ranges(maps, kind, image, b) for b in range(len(groups))] for image in images]
            for kind in ("baseline", "own")
        },
        "runs": [_run(run, r, maps, most, len(images)) for r, run in enumerate(comparison.runs)],
    }


def quantise(values: Tensor, most: float) -> bytes:
    """Values in ``[0, most]`` as one byte each; `ABSENT` for NaN."""
    scaled = (values / most if most > 0 else torch.zeros_like(values)).clamp(min=0, max=1).sqrt() * LEVELS
    return bytes(torch.where(values.isnan(), ABSENT, scaled.round()).nan_to_num(0.0).byte().flatten().numpy())


def _traces(comparison: Comparison) -> Iterator[tuple[int, str, Trace]]:
    for r, run in enumerate(comparison.runs):
        if run.along is not None:
            yield r, "baseline", run.along
        if run.own is not None and run.own is not run.along:
            yield r, "own", run.own


def _groups(comparison: Comparison, num_layers: int) -> list[tuple[int, int]]:
    """All layers, then as many groups of them as the page can hold."""
    size = sum(
        len(trace.tokens) * cells.rows * cells.columns
        for r, _, trace in _traces(comparison)
        for cells in comparison.runs[r].cells
        if cells is not None
    )
    most = min(MAX_BANDS, MAX_BYTES // max(size, 1) - 1)
    single = bands(num_layers, most) if most > 1 else []
    return [(0, num_layers - 1), *(single if len(single) > 1 else [])]


def _maps(trace: Trace, cells: Cells, groups: Sequence[tuple[int, int]]) -> _Maps:
    rows = [
        torch.stack([cells.spread(step) for step in mean_map(trace.within[:, first : last + 1])])
        for first, last in groups
    ]
    return _Maps(cells, torch.stack(rows), cells.covered(trace.sinks))


def _most(values: Sequence[Tensor]) -> float:
    known = [v[~v.isnan()] for v in values]
    joined = torch.cat(known) if known else torch.empty(0)
    return float(joined.max()) if len(joined) else 0.0


def _ranges(maps: dict[tuple[int, str, int], _Maps], kind: str, image: int, band: int) -> dict[str, float]:
    """Values of the brightest colour for maps, for maps without sinks, and for differences to the baseline."""
    # A variant whose own answer is the baseline's has one trace only.
    runs = sorted({r for r, _, i in maps if i == image})
    shown = [maps.get((r, kind, image), maps.get((r, "baseline", image))) for r in runs]
    found = [m for m in shown if m is not None]
    base = maps.get((0, "baseline", image))
    apart = [
        (m.values[band] - base.values[band]).abs()
        for m in found
        if base is not None and m is not base and m.values.shape == base.values.shape
    ]
    return {
        "plain": _quantile([m.values[band] for m in found]),
        "without": _quantile([m.without_sinks[band] for m in found]),
        "apart": _quantile(apart),
    }


def _quantile(values: Sequence[Tensor]) -> float:
    known = [v[~v.isnan()].flatten() for v in values]
    joined = torch.cat(known) if known else torch.empty(0)
    if not len(joined):
        return 0.0
    # torch.quantile refuses more than 16 million values.
    place = min(len(joined) - 1, round(TOP * (len(joined) - 1)))
    return float(f"{float(joined.sort().values[place]):.6g}")


def _run(
    run: Run, r: int, maps: dict[tuple[int, str, int], _Maps], most: Sequence[Sequence[float]], num_images: int
) -> dict[str, Any]:
    traces: dict[str, dict[str, Any] | None] = {}
    for kind, trace in (("baseline", run.along), ("own", run.own)):
        if trace is None or (kind == "own" and trace is run.along):
            traces[kind] = None
            continue
        of_images = [maps.get((r, kind, image)) for image in range(num_images)]
        traces[kind] = {
            **_steps(trace, run if kind == "baseline" else None),
            "images": [None if m is None else _image(m, trace, most[i]) for i, m in enumerate(of_images)],
        }
    return {"name": run.name, "text": run.text, "note": run.note, "traces": traces}


def _steps(trace: Trace, run: Run | None) -> dict[str, Any]:
    """What is known of every token."""
    difference = None if run is None else run.difference
    visual = trace.shares[..., SPANS.index("visual")]
    return {
        "tokens": list(trace.texts),
        "words": word_groups(trace.texts),
        "probability": plain(trace.logp.exp(), 4),
        "rank": trace.rank.tolist(),
        "top": [[[c.text, float(f"{c.probability:.4g}")] for c in step] for step in trace.candidates],
        "dlogp": None if difference is None else plain(difference.dlogp, 4),
        "share": plain(visual.nanmean(dim=1), 4),
        "entropy": plain(trace.entropy, 4),
        "visual": int(trace.visual.shape[-1]),
        "sink_share": float(f"{trace.sink_share:.4g}"),
        "num_sinks": int(trace.sinks.sum()),
    }


def _image(maps: _Maps, trace: Trace, most: Sequence[float]) -> dict[str, Any]:
    cells = maps.cells
    removed = torch.full((cells.rows, cells.columns), trace.present.shape[0])
    for layer in reversed(range(trace.present.shape[0])):
        # From the last layer back, to the first one that nothing of a cell enters any more.
        gone = ~cells.covered(trace.present[layer])
        removed = torch.where(gone & (removed == layer + 1), layer, removed)
    return {
        "rows": cells.rows,
        "columns": cells.columns,
        "box": list(cells.box),
        "merged": cells.merged,
        "data": [base64.b64encode(quantise(v, most[b])).decode() for b, v in enumerate(maps.values)],
        "sinks": maps.sinks.flatten().nonzero().flatten().tolist(),
        "removed": removed.flatten().tolist(),
    }
