"""CHAIR: the algorithm on constructed captions, and the real LLaVA-1.5 captions against their published figures."""

from __future__ import annotations

import gzip
import json

import pytest

from lmmhooks_eval.metrics import chair
from tests.eval.shared import read_lines, shared_file

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


# COCO's pairs, as the official script lists them.
PAIRS = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, "
    "stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, "
    "hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer, stove top oven, "
    "home plate, train track"
)
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")


def _coco() -> chair.Vocabulary:
    synonyms = {}
    for line in shared_file("chair/synonyms.txt").read_text(encoding="utf-8").splitlines():
        node, *others = line.strip().split(", ")
        synonyms[node] = others
    pairs = {pair: pair for pair in PAIRS.split(", ")}
    pairs |= {f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")}
    pairs |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
    known = [word for node, others in synonyms.items() for word in (node, *others)]
    # As the WordNet variant, which keeps "men", "women" and "people" as they are; "ski" is the one singular that is
    # no node.
    singular = chair.builtin_singulariser([*known, *pairs], {"ski": "skis", "knives": "knife", "children": "child"})
    return chair.Vocabulary(synonyms, pairs, singular)


@pytest.mark.parametrize(
    ("captions", "chair_s", "chair_i", "recall"),
    [("beam5", 48.8, 13.85, 79.9), ("greedy", 44.8, 12.7, 80.0), ("opera", 44.6, 12.7, 79.2)],
)
def test_real_captions_come_within_half_a_point(captions: str, chair_s: float, chair_i: float, recall: float) -> None:
    rows = read_lines(f"chair/captions_llava15_7b_{captions}.jsonl.gz")
    coco = json.loads(gzip.decompress(shared_file("chair/coco2014_objects.json.gz").read_bytes()))
    truth = [{coco["categories"][index] for index in coco["objects"][str(row["image_id"])]} for row in rows]
    result = chair.chair([row["caption"] for row in rows], truth, _coco())
    # Target for a singulariser of our own: overall figures within 0.5 points of the WordNet variant.
    assert 100 * result["chair_s"] == pytest.approx(chair_s, abs=0.5)
    assert 100 * result["chair_i"] == pytest.approx(chair_i, abs=0.5)
    assert 100 * result["recall"] == pytest.approx(recall, abs=0.5)
