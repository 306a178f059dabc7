"""
CHAIR: which objects a caption names, and which of them are not in the picture.

Source: Rohrbach, Hendricks et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156, section
3. The vocabulary and the singulariser are arguments: COCO's synonym list and a bundled benchmark's word list run
through the same code. A report must name the singulariser; `builtin` here knows only the words of its vocabulary and
reproduces objects, not English.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmmhooks_eval.metrics.ratio import ratio
from lmmhooks_eval.task import Metric

__all__ = ["METRICS", "Mention", "Vocabulary", "aggregate", "builtin_singulariser", "chair", "score", "tokenise"]

# Treebank conventions where they matter to object words: clitics and punctuation come off, hyphens stay inside a word.
_TOKEN = re.compile(
    r"n't|'(?:s|re|ve|ll|d|m)\b|[a-z0-9]+(?:-[a-z0-9]+)*(?=n't)|[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]", re.IGNORECASE
)


def tokenise(caption: str) -> list[str]:
    """Lower-cased words, clitics and punctuation marks of a caption, each one token."""
    return _TOKEN.findall(caption.lower())


def builtin_singulariser(words: Iterable[str], irregular: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """
    A singulariser that turns a plural into a singular only if that singular is a word of the vocabulary.

    Parameters
    ----------
    words
        Every word of the vocabulary; parts of two-word names count one by one.
    irregular
        Plurals that no rule gives (``{"men": "man"}``); these win over the rules.

    Returns
    -------
    callable
        ``singularise(token) -> token``; a token that is itself a known word, or that leads to none, comes back
        unchanged.
    """
    known = {part for word in words for part in word.split(" ")}
    table = dict(irregular or {})
    endings = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))

    def singularise(token: str) -> str:
        if token in table:
            return table[token]
        if token in known:
            return token
        for plural, singular in endings:
            if token.endswith(plural) and (stem := token[: -len(plural)] + singular) in known:
                return stem
        return token

    return singularise


@dataclass(frozen=True)
class Mention:
    """One object word of a caption: the surface form, the node word it stands for, the index of its token."""

    surface: str
    node: str
    index: int


class Vocabulary:
    """
    Object names, their synonyms and the pairs of words that mean one thing.

    Parameters
    ----------
    synonyms
        ``{node word: all words that stand for it}``; the node word need not repeat itself.
    double_words
        Two adjacent singular words and what to emit for them (``{"fire hydrant": "fire hydrant", "baby bear":
        "bear"}``).
    singularise
        Token to singular; the default is `builtin_singulariser` over the vocabulary.
    variant
        Name of the singulariser, for reports.
    """

    def __init__(
        self,
        synonyms: Mapping[str, Sequence[str]],
        double_words: Mapping[str, str] | None = None,
        singularise: Callable[[str], str] | None = None,
        variant: str = "builtin",
    ) -> None:
        # The first row that lists a word owns it, as in the official dictionary lookup order.
        self.node_of: dict[str, str] = {}
        for node, words in synonyms.items():
            for word in (node, *words):
                self.node_of.setdefault(word, node)
        self.double_words = dict(double_words or {})
        self.singularise = singularise or builtin_singulariser([*self.node_of, *self.double_words])
        self.variant = variant

    def words(self, caption: str) -> list[str]:
        """Singular tokens with double words joined: what `Len` counts."""
        return [word for word, _ in self._joined(caption)]

    def mentions(self, caption: str) -> list[Mention]:
        """Every object word of a caption from left to right, repeats kept."""
        joined = self._joined(caption)
        found = [Mention(word, self.node_of[word], index) for word, index in joined if word in self.node_of]
        # A toilet seat is no seat: the official rule drops every "seat" of a caption that has both words.
        if {"toilet", "seat"} <= {word for word, _ in joined}:
            found = [mention for mention in found if mention.surface != "seat"]
        return found

    def _joined(self, caption: str) -> list[tuple[str, int]]:
        tokens = [self.singularise(token) for token in tokenise(caption)]
        joined: list[tuple[str, int]] = []
        index = 0
        while index < len(tokens):
            pair = " ".join(tokens[index : index + 2])
            is_double = pair in self.double_words
            joined.append((self.double_words[pair] if is_double else tokens[index], index))
            index += 2 if is_double else 1
        return joined


def score(nodes: Sequence[str], truth: Iterable[str], length: int) -> dict[str, float]:
    """
    Sufficient statistics of one caption.

    Parameters
    ----------
    nodes
        Node words the caption names, repeats kept.
    truth
        Node words that are in the picture.
    length
        Number of tokens, see `Vocabulary.words`.
    """
    there, named = set(truth), set(nodes)
    wrong = sum(node not in there for node in nodes)
    return {
        "n": 1.0,
        "hallucinated": float(wrong > 0),
        "mentions": float(len(nodes)),
        "wrong_mentions": float(wrong),
        "named": float(len(named)),
        "hits": float(len(named & there)),
        "objects": float(len(there)),
        "tokens": float(length),
    }


METRICS: tuple[Metric, ...] = (
    Metric("chair_s", "lower", proportion=("hallucinated", "n")),
    Metric("chair_i", "lower"),
    Metric("recall", "higher"),
    Metric("precision", "higher"),
    Metric("f1", "higher"),
    Metric("length", "neither", unit="number"),
)


def aggregate(totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """
    CHAIR_s, CHAIR_i, recall, precision, F1 (all in [0, 1]) and mean length in tokens, from totals of `score`.

    CHAIR_i counts repeats; a caption that names nothing is clean. Recall and precision are over distinct objects,
    pooled.
    """
    precision, recall = ratio(totals["hits"], totals["named"]), ratio(totals["hits"], totals["objects"])
    return {
        "chair_s": ratio(totals["hallucinated"], totals["n"]),
        "chair_i": ratio(totals["wrong_mentions"], totals["mentions"]),
        "recall": recall,
        "precision": precision,
        "f1": ratio(2 * precision * recall, precision + recall),
        "length": ratio(totals["tokens"], totals["n"]),
    }


def chair(captions: Sequence[str], objects: Sequence[Iterable[str]], vocabulary: Vocabulary) -> dict[str, Any]:
    """
    Score captions against the objects of their pictures.

    Parameters
    ----------
    captions
        One caption per picture.
    objects
        The node words of each picture, in the same order.
    vocabulary
        Names, synonyms and singulariser.

    Returns
    -------
    dict
        The metrics of `aggregate`, ``variant``, and ``per_caption``: for each the mentions, the hallucinated ones and
        the objects it misses.

    Raises
    ------
    ValueError
        If the two lists differ in length.
    """
    rows: list[dict[str, float]] = []
    details: list[dict[str, Any]] = []
    for caption, truth in zip(captions, map(set, objects), strict=True):
        mentions = vocabulary.mentions(caption)
        nodes = [mention.node for mention in mentions]
        rows.append(score(nodes, truth, len(vocabulary.words(caption))))
        wrong = [mention for mention in mentions if mention.node not in truth]
        details.append({"mentions": mentions, "hallucinated": wrong, "missed": sorted(truth - set(nodes))})
    names = score([], [], 0)
    figures = aggregate({name: np.asarray(sum(row[name] for row in rows)) for name in names})
    return {name: float(value) for name, value in figures.items()} | {
        "variant": vocabulary.variant,
        "per_caption": details,
    }
