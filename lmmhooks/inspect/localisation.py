"""
How well a map finds what it should: against a box, and against what the answer really depends on.

Boxes are left, top, right and bottom in pixels of the original image. What the model does not see counts as 0. A map
without `faithfulness` is descriptive: that it falls on an object does not show that the answer comes from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.integrate import trapezoid
from torch import Tensor, nn

from lmmhooks.errors import PromptError
from lmmhooks.inspect.maps.occlusion import covered, filling
from lmmhooks.inspect.maps.reading import Passes, watching
from lmmhooks.prompting import as_images, open_image

if TYPE_CHECKING:
    from lmmhooks.geometry import Box, Geometry
    from lmmhooks.inspect.maps.result import AttentionMap

__all__ = [
    "Faithfulness",
    "Localisation",
    "area_under",
    "attention_ratio",
    "faithfulness",
    "localise",
    "mass_inside",
    "points_inside",
    "top_region_iou",
]


def points_inside(geometry: Geometry, values: Tensor, box: Box) -> bool:
    """
    Pointing game: whether the centre of the strongest cell lies in a box.

    Parameters
    ----------
    geometry
        Of the image.
    values
        ``[n]`` per visual token; several grids are joined on the finest one. The first of equally strong cells counts;
        a map that is the same everywhere points nowhere.
    box
        Of the object.
    """
    cells, (left, top, right, bottom) = geometry.grid(values)
    known = cells[~cells.isnan()]
    if not len(known) or known.max() <= known.min():
        return False
    rows, columns = cells.shape
    row, column = divmod(int(cells.nan_to_num(nan=-torch.inf).argmax()), columns)
    x = left + (column + 0.5) * (right - left) / columns
    y = top + (row + 0.5) * (bottom - top) / rows
    return bool(box[0] <= x < box[2] and box[1] <= y < box[3])


def mass_inside(geometry: Geometry, values: Tensor, box: Box) -> float:
    """Share of a map's mass ``[n]``, at least 0, inside a box; cells count by the part of their area. 0 for no mass."""
    known = values.double().cpu().nan_to_num(0.0)
    # Tokens that show no place (newlines) are no part of the map.
    known = known.masked_fill(geometry.rectangles().isnan().any(dim=1), 0.0)
    total = float(known.sum())
    return float((known * geometry.cells_in(box)).sum()) / total if total > 0 else 0.0


def attention_ratio(geometry: Geometry, values: Tensor, box: Box) -> float:
    """
    Mean of a map inside a box over its mean inside all boxes of the same size.

    "MLLMs Know Where to Look" (2502.17422). 1 for a map that is the same everywhere, and for one of no mass.

    Parameters
    ----------
    geometry, values
        See `points_inside`.
    box
        Rounded to whole pixels, at least one; others of its size lie inside the image at every pixel.
    """
    plane = _seen(geometry, values)
    left, top, right, bottom = _pixels(box, plane.shape)
    summed = torch.nn.functional.pad(plane.cumsum(0).cumsum(1), (1, 0, 1, 0))
    height, width = bottom - top, right - left
    sums = summed[height:, width:] - summed[:-height, width:] - summed[height:, :-width] + summed[:-height, :-width]
    mean = float(sums.mean())
    return float(sums[top, left]) / mean if mean > 0 else 1.0


def top_region_iou(geometry: Geometry, values: Tensor, box: Box, share: float = 0.2) -> float:
    """
    Overlap of a map's strongest region with a box: intersection over union, in pixels.

    Parameters
    ----------
    geometry, values
        See `points_inside`.
    box
        Of the object.
    share
        Part of the image, in (0, 1], that the region takes up: pixels at or above the percentile (linear); ties may
        make it larger.
    """
    if not 0 < share <= 1:
        raise PromptError(f"share is {share}; the part of the image that is compared lies in (0, 1]")
    plane = _seen(geometry, values).numpy()
    region = plane >= np.percentile(plane, 100 * (1 - share))
    left, top, right, bottom = _pixels(box, plane.shape)
    inside = int(region[top:bottom, left:right].sum())
    return inside / (int(region.sum()) + (right - left) * (bottom - top) - inside)


@dataclass(frozen=True)
class Localisation:
    """
    A map against a box.

    Attributes
    ----------
    pointing
        See `points_inside`.
    mass
        See `mass_inside`; `area` for a map that is the same everywhere.
    area
        Share of the image that the box takes up.
    ratio
        See `attention_ratio`.
    iou
        See `top_region_iou`, of a region as large as the box.
    """

    pointing: bool
    mass: float
    area: float
    ratio: float
    iou: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return asdict(self)


def localise(geometry: Geometry, values: Tensor, box: Box) -> Localisation:
    """All numbers of a map ``[n]`` against a box."""
    width, height = geometry.size
    left, top, right, bottom = _pixels(box, (height, width))
    area = (right - left) * (bottom - top) / (width * height)
    return Localisation(
        pointing=points_inside(geometry, values, box),
        mass=mass_inside(geometry, values, box),
        area=area,
        ratio=attention_ratio(geometry, values, box),
        iou=top_region_iou(geometry, values, box, area),
    )


@dataclass(frozen=True)
class Faithfulness:
    """
    What hiding cells in the order of a map does to an answer.

    Attributes
    ----------
    hidden
        Shares of the cells that are hidden, from 0 to 1.
    deletion
        Log-probability of the answer when the strongest cells are hidden, for each share; should fall early.
    insertion
        The same when the strongest cells are all that is shown, for each share that is shown; should rise early.
    random_deletion, random_insertion
        The same in random orders, one curve per seed.
    """

    hidden: tuple[float, ...]
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    random_deletion: tuple[tuple[float, ...], ...]
    random_insertion: tuple[tuple[float, ...], ...]

    @property
    def deletion_auc(self) -> float:
        """Area under `deletion`: mean log-probability; lower is better."""
        return area_under(self.hidden, self.deletion)

    @property
    def insertion_auc(self) -> float:
        """Area under `insertion`; higher is better."""
        return area_under(self.hidden, self.insertion)

    @property
    def random_deletion_auc(self) -> tuple[float, ...]:
        return tuple(area_under(self.hidden, curve) for curve in self.random_deletion)

    @property
    def random_insertion_auc(self) -> tuple[float, ...]:
        return tuple(area_under(self.hidden, curve) for curve in self.random_insertion)

    @property
    def better_than_random(self) -> bool:
        """Deletion falls faster, and insertion rises faster, than in each of the random orders."""
        return self.deletion_auc < min(self.random_deletion_auc) and self.insertion_auc > max(self.random_insertion_auc)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible values, areas included."""
        areas = ("deletion_auc", "insertion_auc", "random_deletion_auc", "random_insertion_auc", "better_than_random")
        return {**asdict(self), **{name: getattr(self, name) for name in areas}}


def area_under(shares: Sequence[float], curve: Sequence[float]) -> float:
    """Area under a curve by the trapezoidal rule."""
    return float(trapezoid(curve, shares))


def faithfulness(
    model: nn.Module,
    processor: Any,
    image: Any,
    found: AttentionMap,
    *,
    t: int | None = None,
    steps: int = 10,
    seeds: int = 5,
    fill: str = "mean",
    image_index: int = 0,
    batch: int = 8,
) -> Faithfulness:
    """
    Deletion and insertion curves of a map ("RISE", BMVC 2018, 1806.07421) against random orders.

    Costs ``2 (steps - 1) (1 + seeds) + 2`` readings of the prompt.

    Parameters
    ----------
    model, processor, image
        As for `lmmhooks.inspect.attention_map`; methods on the model act.
    found
        The map, with prompt and answer.
    t
        Row of the map, whose token's log-probability is followed; None: the average, and the sum over its tokens.
    steps
        Points of a curve beside its first.
    seeds
        Random orders, numbered from 0.
    fill
        What hidden cells show: ``"mean"`` colour or a ``"blur"`` of the image.
    image_index
        Which of several images the map is of.
    batch
        Pictures in a forward.

    Raises
    ------
    PromptError
        No steps or seeds, or a map without cells.
    """
    if steps < 1 or seeds < 1:
        raise PromptError(f"steps is {steps} and seeds {seeds}; curves need at least one step and one random order")
    images = [open_image(one) for one in as_images(image)]
    whole = images[image_index]
    filled = filling(whole, fill)
    cells, _ = found.grid(t)
    strength = cells.flatten().nan_to_num(nan=-torch.inf)
    boxes = _cell_boxes(found)
    # Stable: cells of equal strength go in raster order.
    orders = [strength.argsort(descending=True, stable=True).tolist()]
    for seed in range(seeds):
        orders.append(torch.randperm(len(boxes), generator=torch.Generator().manual_seed(seed)).tolist())
    counts = [round(len(boxes) * step / steps) for step in range(steps + 1)]
    pictures = [whole, covered(whole, boxes, filled)]
    for order in orders:
        for count in counts[1:-1]:
            pictures.append(covered(whole, [boxes[i] for i in order[:count]], filled))
            pictures.append(covered(whole, [boxes[i] for i in order[count:]], filled))
    rows = [token.index for token in found.tokens] if t is None else [found.tokens[t].index]
    with watching(model, processor):
        passes = Passes(model, processor, images, found.prompt)
        known = passes.log_probabilities(pictures, image_index, found.answer_ids, batch)
    shown, nothing, *between = known[:, rows].sum(dim=1).tolist()
    curves = []
    for number in range(len(orders)):
        own = between[number * 2 * (steps - 1) : (number + 1) * 2 * (steps - 1)]
        curves.append(((shown, *own[::2], nothing), (nothing, *own[1::2], shown)))
    (deletion, insertion), *others = curves
    return Faithfulness(
        hidden=tuple(step / steps for step in range(steps + 1)),
        deletion=deletion,
        insertion=insertion,
        random_deletion=tuple(curve for curve, _ in others),
        random_insertion=tuple(curve for _, curve in others),
    )


def _cell_boxes(found: AttentionMap) -> list[Box]:
    """Cells of the finest grid, row by row."""
    cells, (left, top, right, bottom) = found.grid(0)
    rows, columns = cells.shape
    width, height = (right - left) / columns, (bottom - top) / rows
    return [
        (left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height)
        for row in range(rows)
        for column in range(columns)
    ]


def _seen(geometry: Geometry, values: Tensor) -> Tensor:
    """The map at the size of the image, cells as they are."""
    return geometry.plane(values, "exact").nan_to_num(nan=0.0)


def _pixels(box: Box, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A box in whole pixels of an image of ``shape`` (height, width): at least one pixel, nothing outside."""
    height, width = shape
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise PromptError(f"box is {tuple(box)}; it must lie in the image of {width} x {height} pixels and hold some")
    x, y = min(round(left), width - 1), min(round(top), height - 1)
    return x, y, max(round(right), x + 1), max(round(bottom), y + 1)
