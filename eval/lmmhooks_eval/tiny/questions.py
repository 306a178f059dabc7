"""Questions, answers and captions about a scene, with labels that follow from the scene alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lmmhooks_eval.tiny.scenes import IMAGE_SIZE, Scene, SceneObject
from lmmhooks_eval.tiny.vocabulary import BY_NAME, COLOURS

Item = TypeVar("Item")

CAPTION_PROMPT = "Describe the image."
MIN_SIDE_OFFSET = 7.0
"""Least distance in pixels between an object and the middle of the image for a side question."""
MIN_RELATION_OFFSET = 14.0
"""Least horizontal distance in pixels between two objects for a relation question."""
NUMBER_WORDS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Question:
    """A question with its only correct answer.

    Parameters
    ----------
    type
        ``existence``, ``colour``, ``attribute``, ``count``, ``side``, ``relation`` or ``caption``.
    text
        The question as the user asks it.
    answer
        The answer as the model is trained to give it, without leading space or end token.
    category
        The category asked about; empty for captions.
    """

    type: str
    text: str
    answer: str
    category: str = ""


def existence(category: str, present: bool) -> Question:
    """``Is there a cup in the image?`` -> ``Yes`` or ``No``."""
    article = BY_NAME[category].article
    return Question("existence", f"Is there {article} {category} in the image?", _yes_no(present), category)


def attribute(category: str, colour: str, present: bool) -> Question:
    """``Is there a red cup in the image?`` -> ``Yes`` or ``No``."""
    article = "an" if colour[0] in "aeiou" else "a"
    text = f"Is there {article} {colour} {category} in the image?"
    return Question("attribute", text, _yes_no(present), category)


def colour(item: SceneObject) -> Question:
    """``What color is the cup?`` -> ``Red``."""
    return Question("colour", f"What color is the {item.category}?", item.colour.capitalize(), item.category)


def count(category: str, number: int) -> Question:
    """``How many cups are in the image?`` -> ``2``."""
    return Question("count", f"How many {BY_NAME[category].plural} are in the image?", str(number), category)


def side(item: SceneObject) -> Question:
    """``Which side is the cup on?`` -> ``Left`` or ``Right``."""
    answer = "Left" if item.centre[0] < IMAGE_SIZE / 2 else "Right"
    return Question("side", f"Which side is the {item.category} on?", answer, item.category)


def relation(first: SceneObject, second: SceneObject) -> Question:
    """``Is the cup left of the bowl?`` -> ``Yes`` or ``No``."""
    text = f"Is the {first.category} left of the {second.category}?"
    return Question("relation", text, _yes_no(first.centre[0] < second.centre[0]), first.category)


def caption(scene: Scene) -> Question:
    """All categories in vocabulary order, with the colour of single objects and the number of repeated ones."""
    phrases = []
    for name in scene.present:
        instances = scene.instances(name)
        if len(instances) > 1:
            phrases.append(f"{NUMBER_WORDS[len(instances)]} {BY_NAME[name].plural}")
        else:
            shade = instances[0].colour
            phrases.append(f"{'an' if shade[0] in 'aeiou' else 'a'} {shade} {name}")
    listing = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return Question("caption", CAPTION_PROMPT, f"The image shows {listing}.")


def single_objects(scene: Scene) -> list[SceneObject]:
    """Objects whose category occurs once, so that "the cup" is unambiguous."""
    return [item for item in scene.objects if len(scene.instances(item.category)) == 1]


def colour_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """Up to ``number`` colour questions about single objects."""
    return [colour(item) for item in _pick(single_objects(scene), number, rng)]


def attribute_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """``number`` attribute questions about present categories, yes and no with equal probability.

    A "no" names a category that is there in a colour that none of its instances has: the category alone does not
    answer the question.
    """
    questions = []
    for index in range(number):
        name = scene.present[int(rng.integers(len(scene.present)))]
        shades = {item.colour for item in scene.instances(name)}
        is_true = bool((index + int(rng.integers(2))) % 2)
        pool = [shade for shade in COLOURS if (shade in shades) == is_true]
        questions.append(attribute(name, pool[int(rng.integers(len(pool)))], is_true))
    return questions


def count_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """Up to ``number`` counting questions; categories that occur several times come first half of the time."""
    names = [scene.present[i] for i in rng.permutation(len(scene.present))]
    if rng.random() < 0.5:  # otherwise nearly every answer would be 1
        names.sort(key=lambda name: -len(scene.instances(name)))
    return [count(name, len(scene.instances(name))) for name in names[:number]]


def side_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """Up to ``number`` side questions about single objects that are clearly left or right of the middle."""
    clear = [item for item in single_objects(scene) if abs(item.centre[0] - IMAGE_SIZE / 2) >= MIN_SIDE_OFFSET]
    return [side(item) for item in _pick(clear, number, rng)]


def relation_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """Up to ``number`` left-of questions about pairs of single objects that are clearly apart."""
    items = single_objects(scene)
    pairs = [(a, b) for a in items for b in items if abs(a.centre[0] - b.centre[0]) >= MIN_RELATION_OFFSET]
    return [relation(*pair) for pair in _pick(pairs, number, rng)]


def existence_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """``number`` existence questions, half about present and half about absent categories (uniform in each half).

    Uniform negatives leave in-theme categories mostly answered by "Yes": this is where the theme prior comes from.
    """
    positives = _pick(list(scene.present), number // 2, rng)
    negatives = _pick(list(scene.absent), number - number // 2, rng)
    return [existence(name, True) for name in positives] + [existence(name, False) for name in negatives]


def _pick(items: Sequence[Item], number: int, rng: np.random.Generator) -> list[Item]:
    return [items[i] for i in rng.permutation(len(items))[:number]]


def _yes_no(value: bool) -> str:
    return "Yes" if value else "No"
