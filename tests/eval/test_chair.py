"""CHAIR: the algorithm on constructed captions; the real ones are in test_chair_task.py."""

from __future__ import annotations

import pytest

from lmmhooks_eval.metrics import chair

SYNONYMS = {
    "person": ["man", "woman", "people"],
    "bus": [],
    "fire hydrant": ["hydrant"],
    "dog": ["puppy"],
    "toilet": [],
    "chair": ["seat"],
}
KNOWN = [word for node, others in SYNONYMS.items() for word in (node, *others)]
WORDS = chair.Vocabulary(
    SYNONYMS,
    {"fire hydrant": "fire hydrant", "hot dog": "hot dog"},
    chair.builtin_singulariser(KNOWN, {"men": "man", "women": "woman"}),
)


def _nodes(caption: str) -> list[str]:
    return [mention.node for mention in WORDS.mentions(caption)]


def test_synonyms_plurals_and_repeats_are_kept() -> None:
    assert _nodes("Two men and a woman wait for buses; the puppies sit.") == ["person", "person", "bus", "dog"]


def test_double_words_win_over_their_parts() -> None:
    mentions = WORDS.mentions("A hot dog next to a fire hydrant")
    assert [(mention.node, mention.index) for mention in mentions] == [("fire hydrant", 6)]


def test_a_toilet_seat_is_no_seat() -> None:
    assert _nodes("a toilet with a white seat") == ["toilet"]
    assert _nodes("a white seat") == ["chair"]


def test_singulariser_leaves_words_that_are_known_or_lead_nowhere() -> None:
    singular = chair.builtin_singulariser(["bus", "knife", "leaf", "glasses"])
    assert [singular(word) for word in ("bus", "buses", "knives", "leaves", "glasses", "has")] == [
        "bus", "bus", "knife", "leaf", "glasses", "has",
    ]  # fmt: skip


def test_metrics_by_hand() -> None:
    captions = ["A man, a dog and a dog.", "A bus.", "Nothing here."]
    truth = [{"person", "bus"}, {"bus"}, {"dog"}]
    result = chair.chair(captions, truth, WORDS)
    assert result["chair_s"] == pytest.approx(1 / 3)
    assert result["chair_i"] == pytest.approx(2 / 4)  # repeats count
    assert result["recall"] == pytest.approx(2 / 4)
    assert result["precision"] == pytest.approx(2 / 3)  # distinct objects
    assert [mention.surface for mention in result["per_caption"][0]["hallucinated"]] == ["dog", "dog"]
    assert [details["missed"] for details in result["per_caption"]] == [["bus"], [], ["dog"]]


def test_no_objects_anywhere_is_zero() -> None:
    result = chair.chair(["Nothing."], [set()], WORDS)
    assert [result[name] for name in ("chair_s", "chair_i", "recall", "precision", "f1")] == [0, 0, 0, 0, 0]


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        chair.chair(["a"], [], WORDS)


def test_tokens_are_words_clitics_and_marks() -> None:
    assert chair.tokenise("It's a T-shirt, isn't it?") == ["it", "'s", "a", "t-shirt", ",", "is", "n't", "it", "?"]
