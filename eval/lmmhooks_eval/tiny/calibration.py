"""Scenes for calibration: like those of the benchmark, from entropy that neither it nor training uses.

Settings measured on the benchmark itself would be scored on what they were chosen by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from lmmhooks_eval.tiny.freeze import benchmark_rows, small_rows
from lmmhooks_eval.tiny.questions import caption
from lmmhooks_eval.tiny.render import render
from lmmhooks_eval.tiny.scenes import Scene, SceneObject, sample_scene
from lmmhooks_eval.tiny.small import SmallScene, sample_small_scene
from lmmhooks_eval.tiny.vocabulary import BY_NAME, THEMES

CALIBRATION_ENTROPY = (9_000_002,)
SMALL_ENTROPY = (9_000_004,)
NUM_SCENES = 160
NUM_SMALL_SCENES = 60
NUM_INVENTED = 2
"""Absent objects that a wrong caption names; as many as there are if the theme has fewer."""


def documents(kind: str) -> list[dict[str, Any]]:
    """
    Documents of a task, about scenes for calibration.

    Parameters
    ----------
    kind
        ``"scenes_pope"``, ``"scenes_vqa"``, ``"scenes_small"`` or ``"scenes_caption"``. Captions carry
        ``value``, the true caption, and ``h_value``, the same with objects put in that usually go with those that are
        there.
    """
    if kind == "scenes_small":
        rows = small_rows(NUM_SMALL_SCENES, SMALL_ENTROPY, "calibration-small")[kind]
        return [{**row, "id": f"calibration-{row['id']}"} for row in rows]
    scenes = [_scene(index)[0] for index in range(NUM_SCENES)]
    rows = _rows()[kind]
    if kind == "scenes_caption":
        return [{**row, **_captions(scene)} for row, scene in zip(rows, scenes, strict=True)]
    return list(rows)


def draw(name: str) -> Image.Image:
    """The image that a document calls ``calibration/NNNN``."""
    scene, rng = _scene(int(name.removeprefix("calibration/")))
    return Image.fromarray(render(scene, rng))


def small_scene(name: str) -> SmallScene:
    """The scene whose image a document of scenes-small calls ``calibration-small/NNNN``."""
    return sample_small_scene((*SMALL_ENTROPY, int(name.removeprefix("calibration-small/"))))


@cache
def _rows() -> dict[str, list[dict[str, Any]]]:
    scenes = [_scene(index)[0] for index in range(NUM_SCENES)]
    rows = benchmark_rows(scenes, [f"calibration/{index:04d}" for index in range(NUM_SCENES)], CALIBRATION_ENTROPY)
    return {kind: [{**row, "id": f"calibration-{row['id']}"} for row in lines] for kind, lines in rows.items()}


def _scene(index: int) -> tuple[Scene, np.random.Generator]:
    """Scene, and the generator in the state from which its image is drawn."""
    rng = np.random.default_rng((*CALIBRATION_ENTROPY, index))
    return sample_scene(rng), rng


def _captions(scene: Scene) -> dict[str, str]:
    """A true caption and one with invented objects."""
    likely = [name for name in THEMES[scene.theme] if name in scene.absent] or list(scene.absent)
    return {"value": caption(scene).answer, "h_value": caption(_with(scene, likely[:NUM_INVENTED])).answer}


def _with(scene: Scene, categories: Sequence[str]) -> Scene:
    invented = [SceneObject(name, BY_NAME[name].preferred_colour, "large", 20, 0, 0, 1.0) for name in categories]
    return replace(scene, objects=(*scene.objects, *invented))
