"""Write the frozen benchmark: ``python -m lmmhooks_eval.tiny.freeze [--out DIR]``.

Images are stored as PNG, so that scores do not depend on how a later NumPy draws random numbers. Those of small objects
are too large for that: what is in them is stored, and a seed. All scenes come from entropy that training never uses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmmhooks_eval.tiny import questions as ask
from lmmhooks_eval.tiny.batches import draw_scenes
from lmmhooks_eval.tiny.loading import data_dir
from lmmhooks_eval.tiny.probes import SPLITS, category_popularity, pope_probes
from lmmhooks_eval.tiny.questions import Question
from lmmhooks_eval.tiny.scenes import Scene
from lmmhooks_eval.tiny.small import question_rows, sample_small_scene
from lmmhooks_eval.tiny.vocabulary import CATEGORIES, COLOURS, THEMES

HELD_OUT_ENTROPY = (9_000_001,)
NUM_SCENES = 280
SMALL_ENTROPY = (9_000_003,)
NUM_SMALL_SCENES = 120


def vqa_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """The scenes-vqa questions of one scene, at most eight.

    Side and relation are trained but not asked: tiny-llava answers them no better than chance.
    """
    return [
        *ask.existence_questions(scene, rng, 2),
        *ask.colour_questions(scene, rng, 2),
        *ask.attribute_questions(scene, rng, 2),
        *ask.count_questions(scene, rng, 2),
    ]


def freeze(out: Path, number: int = NUM_SCENES) -> dict[str, int]:
    """Write images, annotations and tasks.

    Parameters
    ----------
    out
        Folder to write to; created if missing, files of the same name are replaced.
    number
        Number of scenes.

    Returns
    -------
    dict
        File name -> number of lines.
    """
    scenes, images = draw_scenes(HELD_OUT_ENTROPY, number)
    names = [f"images/{index:04d}.png" for index in range(number)]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, pixels in zip(names, images, strict=True):
        Image.fromarray(pixels).save(out / name, optimize=True)
    rows = benchmark_rows(scenes, names, HELD_OUT_ENTROPY) | small_rows(number=NUM_SMALL_SCENES)
    for name, lines in rows.items():
        _write_lines(out / f"{name}.jsonl", lines)
    (out / "vocab.json").write_text(json.dumps(_vocabulary(), indent=1) + "\n", encoding="utf-8")
    return {name: len(lines) for name, lines in rows.items()}


def benchmark_rows(
    scenes: list[Scene], names: Sequence[str], entropy: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Annotations and the documents of every task.

    Parameters
    ----------
    scenes
        The scenes.
    names
        What the documents call the image of each.
    entropy
        Of the choice of questions.

    Returns
    -------
    dict
        File name -> lines.
    """
    popularity = category_popularity(scenes)
    rows: dict[str, list[dict[str, Any]]] = {"scenes": [], "scenes_pope": [], "scenes_vqa": [], "scenes_caption": []}
    for index, (scene, image) in enumerate(zip(scenes, names, strict=True)):
        key = f"{index:04d}"
        rng = np.random.default_rng((*entropy, len(scenes), index))  # apart from the scene's own stream
        rows["scenes"].append({"id": key, "image": image, "theme": scene.theme, "objects": _objects(scene)})
        for split in SPLITS:
            for place, probe in enumerate(pope_probes(scene, split, popularity, rng)):
                rows["scenes_pope"].append(
                    {
                        "id": f"{key}-{split}-{place}",
                        "image": image,
                        "split": split,
                        "question": probe.text,
                        "label": probe.answer.lower(),
                        "category": probe.category,
                    }
                )
        for place, question in enumerate(vqa_questions(scene, rng)):
            rows["scenes_vqa"].append(
                {
                    "id": f"{key}-{question.type}-{place}",
                    "image": image,
                    "type": question.type,
                    "question": question.text,
                    "answer": question.answer,
                }
            )
        rows["scenes_caption"].append(
            {"id": f"{key}-caption", "image": image, "prompt": ask.CAPTION_PROMPT, "objects": list(scene.present)}
        )
    return rows


def small_rows(
    number: int, entropy: Sequence[int] = SMALL_ENTROPY, prefix: str = "small"
) -> dict[str, list[dict[str, Any]]]:
    """
    Scenes of small objects, and the documents about them.

    Parameters
    ----------
    number
        Of scenes.
    entropy
        Scene i comes from ``(*entropy, i)``.
    prefix
        The documents call the image of scene i ``prefix/NNNN``.

    Returns
    -------
    dict
        File name -> lines.
    """
    rows: dict[str, list[dict[str, Any]]] = {"small_scenes": [], "scenes_small": []}
    for index in range(number):
        small, image = sample_small_scene((*entropy, index)), f"{prefix}/{index:04d}"
        rows["small_scenes"].append({"image": image, **small.to_dict()})
        rows["scenes_small"] += question_rows(small, f"{index:04d}", image)
    return rows


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "category": item.category,
            "colour": item.colour,
            "size": item.size,
            "box": list(item.box),
            "faint": item.faint,
        }
        for item in scene.objects
    ]


def _vocabulary() -> dict[str, Any]:
    return {
        "categories": [
            {
                "name": category.name,
                "plural": category.plural,
                "theme": category.theme,
                "synonyms": list(category.synonyms),
            }
            for category in CATEGORIES
        ],
        "themes": {theme: list(members) for theme, members in THEMES.items()},
        "colours": list(COLOURS),
    }


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write the frozen scenes benchmark.")
    parser.add_argument("--out", type=Path, default=data_dir())
    parser.add_argument("--scenes", type=int, default=NUM_SCENES)
    arguments = parser.parse_args()
    for name, lines in freeze(arguments.out, arguments.scenes).items():
        sys.stdout.write(f"{name}: {lines}\n")


if __name__ == "__main__":
    main()
