"""
Scenes with small objects: the objects of `lmmhooks_eval.tiny.scenes` on a canvas of nine times the area.

The bundled models see 112 x 112 pixels. Of a whole canvas that leaves a third of every side: an object of 12 pixels
becomes 4, where the smallest the models were trained on has 13. A crop around it, at the canvas's own resolution or
enlarged, looks like what they were trained on. Nothing is faint here, so size is what makes a question hard. Copies of
a category stand together, so that one crop shows all that a question is about.

Images of this size would be 130 kB each, so objects and a seed are stored and the pixels drawn when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lmmhooks_eval.tiny import questions as ask
from lmmhooks_eval.tiny.render import render
from lmmhooks_eval.tiny.scenes import (
    NOISE_PROBABILITIES,
    NOISE_SIGMAS,
    PREFERRED_COLOUR_PROBABILITY,
    THEME_PROBABILITIES,
    THEMED_BACKGROUND_PROBABILITY,
    Scene,
    SceneObject,
    sample_categories,
)
from lmmhooks_eval.tiny.vocabulary import BY_NAME, COLOURS, THEMES

__all__ = ["CANVAS", "SIZES", "SmallScene", "draw", "question_rows", "region_of", "sample_small_scene"]

CANVAS = 336
"""Side of every canvas, pixels."""
GRID = 3
CELL = CANVAS // GRID
SIZES = {"tiny": (6, 11), "small": (12, 17), "medium": (18, 26), "large": (27, 40)}
"""Size band -> inclusive range of the drawing square's side, pixels of the canvas."""

Region = tuple[int, int, int, int]


@dataclass(frozen=True)
class SmallScene:
    """A scene on the large canvas, and the seed that its texture, colour jitter and noise are drawn from."""

    scene: Scene
    seed: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """What is stored; `from_dict` reads it."""
        names = ("category", "colour", "size", "extent", "left", "top")
        return {
            "theme": self.scene.theme,
            "background": self.scene.background,
            "noise_sigma": self.scene.noise_sigma,
            "seed": list(self.seed),
            "objects": [
                {**{name: getattr(item, name) for name in names}, "box": list(item.box)} for item in self.scene.objects
            ],
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> SmallScene:
        objects = tuple(
            SceneObject(**{name: value for name, value in item.items() if name != "box"}, alpha=1.0)
            for item in stored["objects"]
        )
        scene = Scene(stored["theme"], stored["background"], stored["noise_sigma"], objects)
        return cls(scene, tuple(stored["seed"]))


def sample_small_scene(seed: Sequence[int]) -> SmallScene:
    """The scene of a seed; every category has one size band, and a cell of the canvas to itself."""
    rng = np.random.default_rng((*seed, 0))
    themes = tuple(THEMES)
    theme = themes[int(rng.choice(len(themes), p=THEME_PROBABILITIES))]
    background = theme if rng.random() < THEMED_BACKGROUND_PROBABILITY else themes[int(rng.integers(len(themes)))]
    names = sample_categories(theme, rng)
    kinds = list(dict.fromkeys(names))
    cells = rng.permutation(GRID * GRID)[: len(kinds)]
    bands = rng.permutation(len(SIZES))
    objects: list[SceneObject] = []
    for place, (kind, cell) in enumerate(zip(kinds, cells, strict=True)):
        band = list(SIZES)[int(bands[place % len(SIZES)])]
        objects += _group(kind, names.count(kind), band, int(cell), rng)
    sigma = float(rng.choice(NOISE_SIGMAS, p=NOISE_PROBABILITIES))
    return SmallScene(Scene(theme, background, sigma, tuple(objects)), tuple(seed))


def _group(name: str, copies: int, band: str, cell: int, rng: np.random.Generator) -> list[SceneObject]:
    """Copies of one category, side by side in a cell."""
    low, high = SIZES[band]
    extents = [int(rng.integers(low, high + 1)) for _ in range(copies)]
    pitch = max(extents) + max(2, max(extents) // 4)
    columns, rows = (1, 1) if copies == 1 else (2, 1 if copies == 2 else 2)
    row, column = divmod(cell, GRID)
    left = column * CELL + int(rng.integers(CELL - columns * pitch + 1))
    top = row * CELL + int(rng.integers(CELL - rows * pitch + 1))
    places = [divmod(int(place), columns) for place in rng.permutation(rows * columns)[:copies]]
    colours = tuple(COLOURS)
    made = []
    for extent, (down, across) in zip(extents, places, strict=True):
        preferred = rng.random() < PREFERRED_COLOUR_PROBABILITY
        colour = BY_NAME[name].preferred_colour if preferred else colours[int(rng.integers(len(colours)))]
        x = left + across * pitch + int(rng.integers(pitch - extent + 1))
        y = top + down * pitch + int(rng.integers(pitch - extent + 1))
        made.append(SceneObject(name, colour, band, extent, x, y, 1.0))
    return made


def region_of(scene: Scene, category: str) -> Region:
    """Smallest box ``(x0, y0, x1, y1)`` around all objects of a category, pixels."""
    boxes = np.array([item.box for item in scene.instances(category)])
    x0, y0 = boxes[:, :2].min(axis=0)
    x1, y1 = boxes[:, 2:].max(axis=0)
    return int(x0), int(y0), int(x1), int(y1)


def question_rows(small: SmallScene, key: str, image: str) -> list[dict[str, Any]]:
    """
    Documents about a scene, at most eight.

    Every document has a ``region``: where the objects that it asks about are. What is not there has no place; such a
    document has the region of some other object, ``target`` is False, and a crop of it should make nobody say yes.

    Parameters
    ----------
    small
        The scene.
    key, image
        Beginning of the documents' ids, and what they call the image.
    """
    scene, rng = small.scene, np.random.default_rng((*small.seed, 2))
    asked = [
        *ask.existence_questions(scene, rng, 2),
        *ask.attribute_questions(scene, rng, 2),
        *ask.colour_questions(scene, rng, 2),
        *ask.count_questions(scene, rng, 2),
    ]
    rows = []
    for place, question in enumerate(asked):
        there = question.category in scene.present
        shown = question.category if there else scene.present[int(rng.integers(len(scene.present)))]
        rows.append(
            {
                "id": f"{key}-{question.type}-{place}",
                "image": image,
                "type": question.type,
                "question": question.text,
                "answer": question.answer,
                "size": scene.instances(shown)[0].size,
                "region": list(region_of(scene, shown)),
                "target": there,
            }
        )
    return rows


# A run opens every image once per variant and question; the benchmark's take 40 MB.
@lru_cache(maxsize=128)
def draw(small: SmallScene) -> np.ndarray:
    """Pixels of a scene: uint8 ``(336, 336, 3)``, sRGB, read-only."""
    pixels = render(small.scene, np.random.default_rng((*small.seed, 1)), CANVAS)
    pixels.setflags(write=False)
    return pixels
