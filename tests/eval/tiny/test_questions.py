"""Questions and answers against an independent reading of the scene."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lmmhooks_eval.tiny import questions as ask
from lmmhooks_eval.tiny.batches import NUM_SLOTS, scene_questions
from lmmhooks_eval.tiny.evaluate import WELL_FORMED
from lmmhooks_eval.tiny.probes import SPLITS, absent_categories, category_popularity, pope_probes
from lmmhooks_eval.tiny.scenes import Scene, SceneObject, sample_scene
from lmmhooks_eval.tiny.vocabulary import BY_NAME, CATEGORIES

SCENES = [sample_scene(np.random.default_rng((11, index))) for index in range(200)]


def answer_from_text(scene: Scene, text: str) -> str:
    """The answer, derived from the question's words and the object list alone."""
    words = text.rstrip("?").split()
    by_plural = {category.plural: category.name for category in CATEGORIES}
    if text.startswith("What color"):
        return next(item.colour for item in scene.objects if item.category == words[-1]).capitalize()
    if text.startswith("How many"):
        return str(sum(item.category == by_plural[words[2]] for item in scene.objects))
    if text.startswith("Which side"):
        x0, _, x1, _ = next(item.box for item in scene.objects if item.category == words[4])
        return "Left" if x0 + x1 < 112 else "Right"
    if "left of" in text:
        first, second = (next(item.box for item in scene.objects if item.category == words[i]) for i in (2, 6))
        return "Yes" if first[0] + first[2] < second[0] + second[2] else "No"
    *colour, category = words[3:-3]
    matches = [i for i in scene.objects if i.category == category and (not colour or i.colour == colour[0])]
    return "Yes" if matches else "No"


def test_answers_follow_from_the_scene() -> None:
    asked: Counter[str] = Counter()
    for index, scene in enumerate(SCENES):
        drawn = scene_questions(scene, np.random.default_rng(index))
        assert len(drawn) <= NUM_SLOTS
        for question in drawn:
            asked[question.type] += 1
            assert question.answer == answer_from_text(scene, question.text), question.text
    assert set(asked) == {"existence", "colour", "attribute", "count", "side", "relation"}


def test_yes_and_no_are_balanced() -> None:
    answers: dict[str, list[str]] = {}
    for index, scene in enumerate(SCENES):
        for question in scene_questions(scene, np.random.default_rng(index)):
            answers.setdefault(question.type, []).append(question.answer)
    for kind in ("existence", "attribute", "relation"):
        share = answers[kind].count("Yes") / len(answers[kind])
        # Five standard errors at 180 answers or more; existence lacks a third "yes" in scenes of fewer categories.
        assert 0.3 < share < 0.7, kind


def test_captions_name_everything_and_match_the_grammar() -> None:
    for scene in SCENES:
        text = ask.caption(scene).answer
        assert WELL_FORMED.fullmatch(text), text
        words = text.replace(",", "").replace(".", "").split()
        named = [c.name for c in CATEGORIES if c.name in words or c.plural in words]
        assert tuple(named) == scene.present


@pytest.mark.parametrize("split", SPLITS)
def test_probes_are_balanced_and_true(split: str) -> None:
    popularity = category_popularity(SCENES)
    for index, scene in enumerate(SCENES):
        probes = pope_probes(scene, split, popularity, np.random.default_rng(index))
        assert [probe.answer for probe in probes] == ["Yes", "No"] * (len(probes) // 2)
        assert len({probe.category for probe in probes}) == len(probes)
        for probe in probes:
            assert (probe.category in scene.present) == (probe.answer == "Yes")
            if split == "adversarial" and probe.answer == "No":
                assert BY_NAME[probe.category].theme == scene.theme


def test_popular_negatives_are_the_most_frequent_absent_ones() -> None:
    popularity = category_popularity(SCENES)
    counts = Counter(name for scene in SCENES for name in scene.present)
    assert [counts[name] for name in popularity] == sorted((counts[c.name] for c in CATEGORIES), reverse=True)
    asked = absent_categories(SCENES[0], "popular", popularity, np.random.default_rng(0))
    assert asked == [name for name in popularity if name not in SCENES[0].present]


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'hard'"):
        absent_categories(SCENES[0], "hard", [], np.random.default_rng(0))


def test_side_questions_skip_objects_near_the_middle() -> None:
    middle = SceneObject("cup", "red", "small", 14, 49, 0, 1.0)
    scene = Scene("kitchen", "kitchen", 6.0, (middle,))
    assert ask.side_questions(scene, np.random.default_rng(0), 1) == []
