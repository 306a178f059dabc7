"""Random scenes: which objects there are, where, and in which colour. `render.py` turns a scene into pixels.

The distribution is built so that a model is tempted to hallucinate for the reason real models are: objects of a theme
appear together, so an absent theme partner is likely a priori, while part of the evidence (faint objects, noise) is
weak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmmhooks_eval.tiny.shapes import tight_box
from lmmhooks_eval.tiny.vocabulary import BY_NAME, CATEGORIES, COLOURS, THEMES

IMAGE_SIZE = 112
"""Side of every image, pixels."""
GRID = 4
CELL = IMAGE_SIZE // GRID
MAX_OBJECTS = 8
MAX_CATEGORIES = 6

THEME_PROBABILITIES = (0.34, 0.28, 0.22, 0.16)
IN_THEME_PROBABILITIES = (0.85, 0.75, 0.60, 0.50, 0.40, 0.30)
OFF_THEME_PROBABILITY = 0.045
SECOND_COPY_PROBABILITY, THIRD_COPY_PROBABILITY = 0.30, 0.35
PREFERRED_COLOUR_PROBABILITY = 0.5
FAINT_PROBABILITY = 0.42
FAINT_ALPHA = (0.17, 0.50)
EXTENTS = {"small": (13, 16), "large": (20, 26)}
"""Size band -> inclusive range of the drawing square's side, pixels."""
NOISE_SIGMAS, NOISE_PROBABILITIES = (6.0, 14.0, 24.0), (0.40, 0.35, 0.25)
THEMED_BACKGROUND_PROBABILITY = 0.7


@dataclass(frozen=True)
class SceneObject:
    """One object in a scene.

    Parameters
    ----------
    category, colour
        Names from the vocabulary.
    size
        ``"small"`` or ``"large"``.
    extent
        Side of the square in which the silhouette is drawn, pixels.
    left, top
        Upper left corner of that square, pixels.
    alpha
        Opacity in (0, 1]; below 1 the object is faint.
    """

    category: str
    colour: str
    size: str
    extent: int
    left: int
    top: int
    alpha: float

    @property
    def faint(self) -> bool:
        """Whether the object is drawn half transparent."""
        return self.alpha < 1.0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Exact bounding box ``(x0, y0, x1, y1)`` in pixels, x1 and y1 exclusive."""
        x0, y0, x1, y1 = tight_box(self.category, self.extent)
        return self.left + x0, self.top + y0, self.left + x1, self.top + y1

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box ``(x, y)`` in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A scene: a theme, a background theme, a noise level and up to eight objects that do not overlap."""

    theme: str
    background: str
    noise_sigma: float
    objects: tuple[SceneObject, ...]

    @property
    def present(self) -> tuple[str, ...]:
        """Categories in the scene, each once, in vocabulary order."""
        names = {item.category for item in self.objects}
        return tuple(category.name for category in CATEGORIES if category.name in names)

    @property
    def absent(self) -> tuple[str, ...]:
        """Categories that are not in the scene, in vocabulary order."""
        present = set(self.present)
        return tuple(category.name for category in CATEGORIES if category.name not in present)

    def instances(self, category: str) -> tuple[SceneObject, ...]:
        """All objects of a category."""
        return tuple(item for item in self.objects if item.category == category)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene.

    Parameters
    ----------
    rng
        Source of all randomness; the scene is a function of its state.
    """
    theme_names = tuple(THEMES)
    theme = theme_names[int(rng.choice(len(theme_names), p=THEME_PROBABILITIES))]
    background = theme if rng.random() < THEMED_BACKGROUND_PROBABILITY else theme_names[int(rng.integers(4))]
    names = sample_categories(theme, rng)
    cells = rng.permutation(GRID * GRID)[: len(names)]
    objects = tuple(_place(name, int(cell), rng) for name, cell in zip(names, cells, strict=True))
    return Scene(theme, background, float(rng.choice(NOISE_SIGMAS, p=NOISE_PROBABILITIES)), objects)


def sample_categories(theme: str, rng: np.random.Generator) -> list[str]:
    """Categories of all objects of a scene with this theme, repeated for copies; never empty."""
    chance = {}
    for name, members in THEMES.items():
        for rank, member in enumerate(members):
            popularity = 1.5 - 0.2 * rank  # off-theme objects, too, come from the popular end
            chance[member] = IN_THEME_PROBABILITIES[rank] if name == theme else OFF_THEME_PROBABILITY * popularity
    draws = rng.random(len(CATEGORIES))
    chosen = [category.name for category, draw in zip(CATEGORIES, draws, strict=True) if draw < chance[category.name]]
    if not chosen:
        chosen = [THEMES[theme][0]]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))[:MAX_CATEGORIES]]
    names = []
    for name in chosen:
        copies = 1
        if rng.random() < SECOND_COPY_PROBABILITY:
            copies = 2 + int(rng.random() < THIRD_COPY_PROBABILITY)
        names.append([name] * copies)
    flat = list(chosen)  # one instance of each first, so that the cap never removes a category
    flat += [name for group in names for name in group[1:]]
    return flat[:MAX_OBJECTS]


def _place(name: str, cell: int, rng: np.random.Generator) -> SceneObject:
    colours = tuple(COLOURS)
    preferred = rng.random() < PREFERRED_COLOUR_PROBABILITY
    colour = BY_NAME[name].preferred_colour if preferred else colours[int(rng.integers(len(colours)))]
    size = "large" if rng.random() < 0.5 else "small"
    low, high = EXTENTS[size]
    extent = int(rng.integers(low, high + 1))
    row, column = divmod(cell, GRID)
    left = column * CELL + int(rng.integers(CELL - extent + 1))
    top = row * CELL + int(rng.integers(CELL - extent + 1))
    alpha = float(rng.uniform(*FAINT_ALPHA)) if rng.random() < FAINT_PROBABILITY else 1.0
    return SceneObject(name, colour, size, extent, left, top, alpha)
