"""
COCO's object words as CHAIR uses them: its synonym list, its two-word names, and the objects of an image.

Source: the released scorer of arXiv 1809.02156 (LisaAnne/Hallucination) and its Python 3 port. The synonym list itself
is read from a file. Words are singularised by the variant ``builtin``, which stands in for the scorer's WordNet variant
and is held to its published figures by tests; the ``pattern`` variant of the first release is not offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lmmhooks_eval.metrics import chair

__all__ = ["double_words", "objects_from_annotations", "read_synonyms", "vocabulary"]

# Pairs that are one object, or that keep a part from being taken for one (a hot dog is no dog).
_PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant",
    "laptop computer", "stove top oven", "home plate", "train track",
)  # fmt: skip
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")
_OTHERS = {"bow tie": "tie", "toilet seat": "toilet"}
# Plurals that no rule gives, and the one singular that is not the name of its object. "men", "women" and "people" are
# missing on purpose: the WordNet variant keeps "men" and "women", which are no words of the list.
_IRREGULAR = {"ski": "skis", "knives": "knife", "children": "child"}


def double_words() -> dict[str, str]:
    """Two adjacent singular words and what the scorer emits for them."""
    joined = {pair: pair for pair in _PAIRS}
    joined |= {f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")}
    joined |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
    return joined | _OTHERS


def read_synonyms(text: str) -> dict[str, list[str]]:
    """
    The synonym list: per line a node word and the words that stand for it.

    Split exactly as released, on a comma and one space: the two entries with a second space in front keep it and never
    match, which is what the published figures were computed with.

    Raises
    ------
    ValueError
        If a line is empty, so that a truncated or foreign file is not taken for a short list.
    """
    synonyms = {}
    for number, line in enumerate(text.splitlines(), 1):
        node, *others = line.strip().split(", ")
        if not node:
            raise ValueError(f"line {number} of the synonym list is empty")
        synonyms[node] = others
    return synonyms


def vocabulary(synonyms: Mapping[str, list[str]]) -> chair.Vocabulary:
    """CHAIR's vocabulary over COCO's categories, singularised by `chair.builtin_singulariser`."""
    pairs = double_words()
    known = [word for node, others in synonyms.items() for word in (node, *others)]
    return chair.Vocabulary(synonyms, pairs, chair.builtin_singulariser([*known, *pairs], _IRREGULAR))


def objects_from_annotations(
    instances: Mapping[str, Any], captions: Mapping[str, Any], words: chair.Vocabulary
) -> dict[str, list[str]]:
    """
    Ground truth of every annotated image: its instances' categories and what its reference captions name.

    Parameters
    ----------
    instances, captions
        COCO's ``instances_*.json`` and ``captions_*.json`` of one split.
    words
        Reads both; the truth and the captions to score must go through the same one.

    Returns
    -------
    dict
        ``{image id: sorted node words}``.

    Raises
    ------
    KeyError
        For a category that the vocabulary does not know, or annotations without the expected fields.
    """
    category = {entry["id"]: words.node_of[entry["name"]] for entry in instances["categories"]}
    found: dict[str, set[str]] = {str(image["id"]): set() for image in instances["images"]}
    for instance in instances["annotations"]:
        found[str(instance["image_id"])].add(category[instance["category_id"]])
    for caption in captions["annotations"]:
        found[str(caption["image_id"])] |= _nodes(words.mentions(caption["caption"]))
    return {image: sorted(nodes) for image, nodes in found.items()}


def _nodes(mentions: Iterable[chair.Mention]) -> set[str]:
    return {mention.node for mention in mentions}
