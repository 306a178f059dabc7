"""
How well maps find what is asked about: every source of maps against the exact boxes of a task's documents.

Sources are the kinds of `lmmhooks.inspect.attention_map`, per decoder layer where a kind has layers, and the maps of
refinement methods as these make them. All are read for the first token of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmmhooks.inspect import attention_map
from lmmhooks.inspect.localisation import localise
from lmmhooks.inspect.maps.relative import relative
from lmmhooks.methods.refinement.base import NEUTRAL
from lmmhooks.methods.refinement.nested import MapOfAnother
from lmmhooks.patch import wrap
from lmmhooks_eval import stats
from lmmhooks_eval.errors import TaskError
from lmmhooks_eval.metrics.ratio import ratio

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lmmhooks.geometry import Box, Geometry
    from lmmhooks.methods.refinement.saliency import Saliency
    from lmmhooks_eval.task import Doc, Task

__all__ = ["CHANCE", "KINDS", "MEASURES", "Found", "Score", "maps_of", "measure", "question_of", "score", "summary"]

KINDS = ("raw", "relative", "grad", "relevancy", "rollout", "flow", "tam", "occlusion")
"""Kinds of map that are measured; the first three layer by layer."""
MEASURES = ("hit", "pointing", "mass", "ratio", "iou")
CHANCE = "chance"
"""The source that says nothing: a cell drawn at random, a map that is the same everywhere."""


@dataclass(frozen=True, eq=False)
class Found:
    """
    One map.

    Attributes
    ----------
    source
        Kind of map, or name of a method.
    layer
        Decoder layer, 0-based; None where the map is of no single one.
    values, geometry
        ``[n]`` per visual token, and where these lie.
    """

    source: str
    layer: int | None
    values: Tensor
    geometry: Geometry


@dataclass(frozen=True)
class Score:
    """
    One map against one box.

    Attributes
    ----------
    hit
        The strongest cell shows a part of the box. Where cells are larger than objects this is what a map can be asked
        for.
    pointing, mass, ratio, iou
        See `lmmhooks.inspect.localisation.Localisation`.
    """

    hit: float
    pointing: float
    mass: float
    ratio: float
    iou: float


@dataclass(frozen=True)
class _MapAlone(MapOfAnother):
    """Keeps the map of a method instead of answering with it."""

    id: ClassVar[str] = "map-alone"

    made: list[Saliency] = field(default_factory=list, init=False, repr=False, compare=False)

    def answer(self, ask: Any, image: Any, prompt: str, **generate_kwargs: Any) -> str:
        self.made.append(self.saliency(ask))
        return ""


def measure(
    model: Any,
    processor: Any,
    task: Task,
    docs: Sequence[Doc],
    methods: Mapping[str, str],
    kinds: Sequence[str] = KINDS,
    told: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Score every source on every document that has a box.

    Parameters
    ----------
    model, processor
        As loaded.
    task
        Knows the boxes (`Task.target`).
    docs
        Of the task; those whose answer is nowhere in the image are left out.
    methods
        Name -> method of the common shape with its settings, as a recipe writes it.
    kinds
        Of `KINDS`.
    told
        Called with the number of documents that are done.

    Returns
    -------
    list of dict
        ``doc``, ``cluster``, ``group`` (size band of the document, or empty), ``source``, ``layer`` and the `MEASURES`.

    Raises
    ------
    TaskError
        The task has no boxes, or none of the documents has one.
    """
    if task.target is None:
        raise TaskError(f"task {task.name!r} does not know where things are; maps are measured on tasks that do")
    rows: list[dict[str, Any]] = []
    for place, doc in enumerate(docs):
        if (box := task.target(doc)) is not None:
            [image] = task.images(doc)
            shared = {"doc": str(doc["id"]), "cluster": task.cluster(doc), "group": str(doc.get("size", ""))}
            geometry: Geometry | None = None
            for found in maps_of(model, processor, image.convert("RGB"), question_of(task, doc), methods, kinds):
                geometry = geometry or found.geometry
                scored = asdict(score(found.geometry, found.values, box))
                rows.append({**shared, "source": found.source, "layer": found.layer, **scored})
            if geometry is not None:
                rows.append({**shared, "source": CHANCE, "layer": None, **asdict(chance(geometry, box))})
        if told is not None:
            told(place + 1)
    if not rows:
        raise TaskError(f"none of {len(docs)} documents of {task.name!r} asks about something that is in one place")
    return rows


def maps_of(
    model: Any, processor: Any, image: Image, question: str, methods: Mapping[str, str], kinds: Sequence[str] = KINDS
) -> Iterator[Found]:
    """Every map of one question; parameters as in `measure`."""

    def mapped(kind: str, prompt: str = question, **settings: Any) -> Any:
        return attention_map(
            model, processor, image, prompt, kind=kind, tokens=[0], max_new_tokens=1, token_filter="none", **settings
        )

    raw = mapped("raw")
    layers = list(raw.layers)
    if "raw" in kinds:
        yield Found("raw", None, raw.values[0], raw.geometry)
        for place, layer in enumerate(layers):
            yield Found("raw", layer, raw.by_layer[0, place], raw.geometry)
    if "relative" in kinds:
        neutral = mapped("raw", NEUTRAL)
        yield Found("relative", None, relative(raw.values[0], neutral.values[0]), raw.geometry)
        for place, layer in enumerate(layers):
            ratios = relative(raw.by_layer[0, place], neutral.by_layer[0, place])
            yield Found("relative", layer, ratios, raw.geometry)
    if "grad" in kinds:
        for layer in layers:
            made = mapped("grad", layers=[layer])
            yield Found("grad", layer, made.values[0], made.geometry)
    for kind in kinds:
        if kind not in ("raw", "relative", "grad"):
            made = mapped(kind)
            yield Found(kind, None, made.values[0], made.geometry)
    for name, spec in methods.items():
        saliency = _map_of_method(model, processor, image, question, spec)
        yield Found(name, None, saliency.values, saliency.geometry)


def score(geometry: Geometry, values: Tensor, box: Box) -> Score:
    """A map ``[n]`` against a box ``(left, top, right, bottom)`` in pixels of the image."""
    known = values.double().cpu().nan_to_num(nan=-np.inf)
    known = known.masked_fill(geometry.rectangles().isnan().any(dim=1), -np.inf)
    strongest = int(known.argmax())
    # A map that is the same everywhere points nowhere.
    points = bool(known.max() > known[known.isfinite()].min())
    all_of = localise(geometry, values, box)
    return Score(
        hit=float(points and bool(geometry.cells_in(box)[strongest] > 0)),
        pointing=float(all_of.pointing),
        mass=all_of.mass,
        ratio=all_of.ratio,
        iou=all_of.iou,
    )


def chance(geometry: Geometry, box: Box) -> Score:
    """What a cell drawn at random, and a map that is the same everywhere, get on average."""
    rectangles = geometry.rectangles()
    rectangles = rectangles[~rectangles.isnan().any(dim=1)]
    x, y = (rectangles[:, 0] + rectangles[:, 2]) / 2, (rectangles[:, 1] + rectangles[:, 3]) / 2
    left, top, right, bottom = box
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    touched = (geometry.cells_in(box) > 0).sum() / len(rectangles)
    width, height = geometry.size
    area = (right - left) * (bottom - top) / (width * height)
    # A region that lies at random covers its own share of the box, on average.
    return Score(
        hit=float(touched), pointing=float(inside.double().mean()), mass=area, ratio=1.0, iou=area / (2 - area)
    )


def summary(rows: Sequence[Mapping[str, Any]], draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """
    Means per source and layer with cluster-bootstrap intervals, and of ``hit`` per group.

    Parameters
    ----------
    rows
        As `measure` returns them.
    draws, seed
        Of the resampling; the unit is the image.

    Returns
    -------
    dict
        ``documents``, ``images``, ``groups`` (documents per group) and ``sources``: a list with ``source``, ``layer``,
        a ``{value, interval}`` per measure, ``against_chance`` (difference of ``hit``, its interval and p) and
        ``by_group`` (``hit``).
    """
    clusters = sorted({row["cluster"] for row in rows})
    by_map: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_map.setdefault((row["source"], row["layer"]), []).append(row)
    nothing = by_map[CHANCE, None]
    groups = sorted({row["group"] for row in nothing} - {""})
    names = [*MEASURES, "n", *(f"{group}/{what}" for group in groups for what in ("hit", "n"))]

    def table(of: Sequence[Mapping[str, Any]]) -> np.ndarray:
        place = {cluster: index for index, cluster in enumerate(clusters)}
        sums = np.zeros((len(clusters), len(names)))
        for row in of:
            counted = {**{name: row[name] for name in MEASURES}, "n": 1.0}
            if row["group"]:
                counted |= {f"{row['group']}/hit": row["hit"], f"{row['group']}/n": 1.0}
            for name, value in counted.items():
                sums[place[row["cluster"]], names.index(name)] += float(value)
        return sums

    def aggregate(totals: np.ndarray) -> dict[str, np.ndarray]:
        named = dict(zip(names, totals, strict=True))
        means = {name: ratio(named[name], named["n"]) for name in MEASURES}
        return means | {group: ratio(named[f"{group}/hit"], named[f"{group}/n"]) for group in groups}

    base = table(nothing)
    sources = []
    for (source, layer), scored in by_map.items():
        estimates = stats.paired_bootstrap(base, table(scored), aggregate, draws=draws, seed=seed)
        hit = estimates["hit"]
        sources.append(
            {
                "source": source,
                "layer": layer,
                **{
                    name: {"value": estimates[name].value, "interval": list(estimates[name].interval)}
                    for name in MEASURES
                },
                "against_chance": {
                    "difference": hit.difference,
                    "interval": list(hit.difference_interval),
                    "p": hit.p,
                },
                "by_group": {group: estimates[group].value for group in groups},
            }
        )
    return {
        "documents": len(nothing),
        "images": len(clusters),
        "groups": {group: sum(row["group"] == group for row in nothing) for group in groups},
        "sources": sources,
    }


def question_of(task: Task, doc: Doc) -> str:
    """The text of a document's question in the task's first wording."""
    [message] = task.messages(doc)
    text: str = next(part["text"] for part in message["content"] if part["type"] == "text")
    return text


def _map_of_method(model: Any, processor: Any, image: Image, question: str, spec: str) -> Saliency:
    with wrap(model, _MapAlone(map=spec), processor=processor) as patch:
        patch.answer(image, question)
        method: Any = patch.methods[0]
    saliency: Saliency = method.made[-1]
    return saliency
