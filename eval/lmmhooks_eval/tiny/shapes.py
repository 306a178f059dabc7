"""Silhouettes of the scene categories as analytic masks.

Every silhouette is a predicate on the plane (x to the right, y down, both in [-1, 1]) put together from discs, boxes,
polygons and bars. No font and no library rasteriser is involved, so a mask depends on arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

Array = np.ndarray
Silhouette = Callable[[Array, Array], Array]

SUPERSAMPLING = 4  # samples per pixel side: coverage in steps of 1/16


def _disc(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float | None = None) -> Array:
    return ((x - cx) / rx) ** 2 + ((y - cy) / (ry or rx)) ** 2 <= 1.0


def _box(x: Array, y: Array, x0: float, y0: float, x1: float, y1: float) -> Array:
    return (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)


def _convex(x: Array, y: Array, *corners: tuple[float, float]) -> Array:
    """Convex polygon, corners in clockwise order as seen with y pointing down."""
    inside = np.ones(np.broadcast(x, y).shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0.0
    return inside


def _bar(x: Array, y: Array, ax: float, ay: float, bx: float, by: float, width: float) -> Array:
    """All points closer than ``width`` / 2 to the segment from a to b."""
    dx, dy = bx - ax, by - ay
    along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
    return (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2 <= (width / 2) ** 2


def _cup(x: Array, y: Array) -> Array:
    handle = _disc(x, y, 0.5, 0.0, 0.5) & ~_disc(x, y, 0.5, 0.0, 0.26)
    return _box(x, y, -0.9, -0.75, 0.45, 0.8) | handle


def _bowl(x: Array, y: Array) -> Array:
    return (_disc(x, y, 0.0, -0.3, 1.0) & (y >= -0.3)) | _box(x, y, -0.4, 0.6, 0.4, 0.85)


def _spoon(x: Array, y: Array) -> Array:
    return _disc(x, y, 0.0, -0.55, 0.38, 0.45) | _box(x, y, -0.13, -0.2, 0.13, 1.0)


def _fork(x: Array, y: Array) -> Array:
    tines = (
        _box(x, y, -0.52, -1.0, -0.28, -0.1) | _box(x, y, -0.12, -1.0, 0.12, 1.0) | _box(x, y, 0.28, -1.0, 0.52, -0.1)
    )
    return tines | _box(x, y, -0.52, -0.3, 0.52, -0.05)


def _pan(x: Array, y: Array) -> Array:
    return _disc(x, y, -0.35, 0.0, 0.65) | _box(x, y, 0.2, -0.14, 1.0, 0.14)


def _bottle(x: Array, y: Array) -> Array:
    shoulder = _convex(x, y, (-0.17, -0.45), (0.17, -0.45), (0.42, -0.1), (-0.42, -0.1))
    return _box(x, y, -0.17, -1.0, 0.17, -0.4) | shoulder | _box(x, y, -0.42, -0.1, 0.42, 1.0)


def _car(x: Array, y: Array) -> Array:
    cabin = _convex(x, y, (-0.4, -0.55), (0.3, -0.55), (0.6, 0.0), (-0.65, 0.0))
    wheels = _disc(x, y, -0.55, 0.38, 0.27) | _disc(x, y, 0.55, 0.38, 0.27)
    return cabin | _box(x, y, -1.0, -0.05, 1.0, 0.38) | wheels


def _bus(x: Array, y: Array) -> Array:
    windows = _box(x, y, -0.8, -0.5, -0.4, -0.1) | _box(x, y, -0.2, -0.5, 0.2, -0.1) | _box(x, y, 0.4, -0.5, 0.8, -0.1)
    wheels = _disc(x, y, -0.55, 0.58, 0.24) | _disc(x, y, 0.55, 0.58, 0.24)
    return (_box(x, y, -1.0, -0.75, 1.0, 0.58) & ~windows) | wheels


def _tree(x: Array, y: Array) -> Array:
    crown = _convex(x, y, (0.0, -1.0), (0.55, -0.25), (-0.55, -0.25)) | _convex(
        x, y, (0.0, -0.6), (0.8, 0.5), (-0.8, 0.5)
    )
    return crown | _box(x, y, -0.17, 0.4, 0.17, 1.0)


def _house(x: Array, y: Array) -> Array:
    door = _box(x, y, -0.2, 0.35, 0.2, 1.0)
    return _convex(x, y, (0.0, -0.95), (0.95, -0.1), (-0.95, -0.1)) | (_box(x, y, -0.7, -0.1, 0.7, 0.95) & ~door)


def _sign(x: Array, y: Array) -> Array:
    octagon = (np.maximum(np.abs(x), np.abs(y + 0.4)) <= 0.6) & (np.abs(x) + np.abs(y + 0.4) <= 0.84)
    return octagon | _box(x, y, -0.1, 0.0, 0.1, 1.0)


def _lamp(x: Array, y: Array) -> Array:
    arm = _box(x, y, -0.55, -1.0, -0.33, 1.0) | _box(x, y, -0.55, -1.0, 0.45, -0.8) | _box(x, y, -0.8, 0.8, -0.1, 1.0)
    return arm | _convex(x, y, (0.25, -0.85), (0.6, -0.85), (0.85, -0.35), (0.0, -0.35))


def _boat(x: Array, y: Array) -> Array:
    hull = _convex(x, y, (-1.0, 0.35), (1.0, 0.35), (0.6, 0.85), (-0.6, 0.85))
    sails = _convex(x, y, (0.08, -0.95), (0.8, 0.2), (0.08, 0.2)) | _convex(
        x, y, (-0.08, -0.6), (-0.08, 0.2), (-0.6, 0.2)
    )
    return hull | sails | _box(x, y, -0.08, -0.95, 0.08, 0.4)


def _star(x: Array, y: Array) -> Array:
    # Distance to the outline of a five-pointed star, folded into one half of one arm.
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    tip, notch = 1.0, 0.42
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    nx, ny = notch * np.cos(np.pi / 5), notch * np.sin(np.pi / 5)
    return (nx - tip) * py - ny * (px - tip) >= 0.0


def _crab(x: Array, y: Array) -> Array:
    claws = _disc(x, y, -0.68, -0.55, 0.3) | _disc(x, y, 0.68, -0.55, 0.3)
    pinch = _box(x, y, -0.76, -0.9, -0.6, -0.5) | _box(x, y, 0.6, -0.9, 0.76, -0.5)
    legs = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for side in (-1.0, 1.0):
        legs |= _bar(x, y, side * 0.55, -0.1, side * 0.7, -0.5, 0.16)
        legs |= _bar(x, y, side * 0.4, 0.3, side * 0.95, 0.45, 0.16) | _bar(
            x, y, side * 0.3, 0.4, side * 0.75, 0.85, 0.16
        )
    return _disc(x, y, 0.0, 0.2, 0.62, 0.45) | (claws & ~pinch) | legs


def _umbrella(x: Array, y: Array) -> Array:
    canopy = _disc(x, y, 0.0, 0.0, 1.0, 0.9) & (y <= 0.0)
    hook = _disc(x, y, 0.22, 0.7, 0.3) & ~_disc(x, y, 0.22, 0.7, 0.12) & (y >= 0.7)
    return canopy | _box(x, y, -0.09, 0.0, 0.09, 0.75) | hook


def _anchor(x: Array, y: Array) -> Array:
    ring = _disc(x, y, 0.0, -0.72, 0.28) & ~_disc(x, y, 0.0, -0.72, 0.1)
    arc = _disc(x, y, 0.0, 0.1, 0.9, 0.85) & ~_disc(x, y, 0.0, 0.0, 0.68, 0.66) & (y >= 0.15)
    return ring | _box(x, y, -0.12, -0.5, 0.12, 0.9) | _box(x, y, -0.5, -0.35, 0.5, -0.13) | arc


def _flag(x: Array, y: Array) -> Array:
    return _box(x, y, -0.75, -1.0, -0.53, 1.0) | _convex(x, y, (-0.6, -0.95), (0.9, -0.45), (-0.6, 0.15))


def _moon(x: Array, y: Array) -> Array:
    return _disc(x, y, 0.0, 0.0, 0.95) & ~_disc(x, y, 0.42, -0.12, 0.78)


def _cloud(x: Array, y: Array) -> Array:
    puffs = _disc(x, y, -0.5, 0.15, 0.42) | _disc(x, y, 0.05, -0.15, 0.52) | _disc(x, y, 0.58, 0.15, 0.4)
    return puffs | _box(x, y, -0.55, 0.15, 0.6, 0.55)


def _plane(x: Array, y: Array) -> Array:
    body = _disc(x, y, 0.0, 0.0, 0.2, 1.0)
    wings = _convex(x, y, (0.0, -0.35), (1.0, 0.25), (1.0, 0.45), (-1.0, 0.45), (-1.0, 0.25)) & ~_convex(
        x, y, (0.0, 0.12), (1.2, 0.55), (-1.2, 0.55)
    )
    return body | wings | _convex(x, y, (0.0, 0.5), (0.45, 0.9), (-0.45, 0.9))


def _kite(x: Array, y: Array) -> Array:
    rhombus = _convex(x, y, (0.0, -1.0), (0.6, -0.4), (0.0, 0.45), (-0.6, -0.4))
    return rhombus | _bar(x, y, 0.0, 0.4, 0.35, 0.7, 0.16) | _bar(x, y, 0.35, 0.7, -0.15, 0.95, 0.16)


def _balloon(x: Array, y: Array) -> Array:
    knot = _convex(x, y, (0.0, 0.2), (0.2, 0.5), (-0.2, 0.5))
    return _disc(x, y, 0.0, -0.35, 0.58, 0.65) | knot | _box(x, y, -0.07, 0.45, 0.07, 1.0)


def _rocket(x: Array, y: Array) -> Array:
    nose = _convex(x, y, (0.0, -1.0), (0.3, -0.5), (-0.3, -0.5))
    fins = _convex(x, y, (-0.3, 0.1), (-0.3, 0.6), (-0.75, 0.85)) | _convex(x, y, (0.3, 0.1), (0.75, 0.85), (0.3, 0.6))
    body = _box(x, y, -0.3, -0.5, 0.3, 0.6) & ~_disc(x, y, 0.0, -0.2, 0.16)
    return nose | body | fins | _convex(x, y, (-0.18, 0.65), (0.18, 0.65), (0.0, 1.0))


SILHOUETTES: dict[str, Silhouette] = {
    "cup": _cup,
    "bowl": _bowl,
    "spoon": _spoon,
    "fork": _fork,
    "pan": _pan,
    "bottle": _bottle,
    "car": _car,
    "bus": _bus,
    "tree": _tree,
    "house": _house,
    "sign": _sign,
    "lamp": _lamp,
    "boat": _boat,
    "star": _star,
    "crab": _crab,
    "umbrella": _umbrella,
    "anchor": _anchor,
    "flag": _flag,
    "moon": _moon,
    "cloud": _cloud,
    "plane": _plane,
    "kite": _kite,
    "balloon": _balloon,
    "rocket": _rocket,
}
"""Category name -> predicate on the plane."""


@cache
def mask(category: str, extent: int) -> Array:
    """Coverage mask of a silhouette.

    Parameters
    ----------
    category
        A key of `SILHOUETTES`.
    extent
        Side of the square that [-1, 1] x [-1, 1] is drawn into, in pixels, >= 4.

    Returns
    -------
    numpy.ndarray
        float32 ``(extent, extent)``, share of every pixel that is covered, in [0, 1]. Read-only and cached.
    """
    fine = extent * SUPERSAMPLING
    axis = (np.arange(fine) + 0.5) / fine * 2.0 - 1.0
    inside = SILHOUETTES[category](axis[None, :], axis[:, None])
    coverage = inside.reshape(extent, SUPERSAMPLING, extent, SUPERSAMPLING).mean(axis=(1, 3), dtype=np.float32)
    coverage.setflags(write=False)
    return coverage


@cache
def tight_box(category: str, extent: int) -> tuple[int, int, int, int]:
    """Smallest box around all pixels that `mask` covers by at least one half.

    Returns
    -------
    tuple of int
        ``(x0, y0, x1, y1)`` in pixels relative to the mask; x1 and y1 are exclusive.
    """
    solid = mask(category, extent) >= 0.5
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
