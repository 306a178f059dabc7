"""POPE-style existence probes: which absent categories to ask about.

The three samplings follow POPE (Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP
2023): random, popular (most frequent in the data set) and adversarial (most often together with what is there, here:
of the same theme).
"""

from __future__ import annotations

import numpy as np

from lmmhooks_eval.tiny.questions import Question, existence
from lmmhooks_eval.tiny.scenes import Scene
from lmmhooks_eval.tiny.vocabulary import THEMES

SPLITS = ("random", "popular", "adversarial")
PROBES_PER_ANSWER = 3
"""Yes-probes, and no-probes, per image and split."""


def absent_categories(scene: Scene, split: str, popularity: list[str], rng: np.random.Generator) -> list[str]:
    """Absent categories in the order in which a split asks about them.

    Parameters
    ----------
    scene
        The scene; only its absent categories are returned.
    split
        ``random``, ``popular`` or ``adversarial``. Adversarial holds the absent categories of the scene's own theme
        only, so it may be shorter than three.
    popularity
        All categories, most frequent in the data set first.
    rng
        Used by ``random`` alone.

    Raises
    ------
    ValueError
        If the split is unknown.
    """
    absent = list(scene.absent)
    if split == "random":
        return [absent[i] for i in rng.permutation(len(absent))]
    if split == "popular":
        return [name for name in popularity if name in absent]
    if split == "adversarial":
        return [name for name in THEMES[scene.theme] if name in absent]
    raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")


def pope_probes(scene: Scene, split: str, popularity: list[str], rng: np.random.Generator) -> list[Question]:
    """Balanced probes of one image: up to three present and equally many absent categories, yes and no alternating."""
    present = [scene.present[i] for i in rng.permutation(len(scene.present))]
    absent = absent_categories(scene, split, popularity, rng)
    number = min(PROBES_PER_ANSWER, len(present), len(absent))
    return [probe for i in range(number) for probe in (existence(present[i], True), existence(absent[i], False))]


def category_popularity(scenes: list[Scene]) -> list[str]:
    """Categories by the number of scenes that hold them, most frequent first; ties in vocabulary order."""
    counts = {name: 0 for members in THEMES.values() for name in members}
    for scene in scenes:
        for name in scene.present:
            counts[name] += 1
    return sorted(counts, key=lambda name: -counts[name])
