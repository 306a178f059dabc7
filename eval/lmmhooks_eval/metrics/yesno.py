"""
Yes/no answers: POPE's official parser, the variants in circulation, and the metrics with *yes* as the positive class.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, arXiv 2305.10355,
and its released scorer. The parsers of other harnesses differ by whole points on terse or hedging models, so a result
names its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lmmhooks_eval.metrics.ratio import ratio
from lmmhooks_eval.task import AnswerWords, Metric, Parsed

__all__ = [
    "PARSERS",
    "POPE_SPLITS",
    "WORDS",
    "aggregate",
    "gold_substring",
    "is_yes_or_no",
    "metrics",
    "official",
    "opera",
    "pope_aggregate",
    "pope_score",
    "score",
    "strict",
    "vlmevalkit",
]

POPE_SPLITS = ("random", "popular", "adversarial")
"""How negatives are drawn: evenly, by frequency, by co-occurrence with what is in the picture."""

WORDS = AnswerWords("Yes", "No", lambda doc: bool(doc["label"] == "yes"), lambda doc: str(doc["split"]))
"""The first token decides between these; other spellings (yes, YES) are what a model writes that was asked for them."""

Verdict = Literal["yes", "no"]
_PLAIN = re.compile(r"(yes|no)\b", re.IGNORECASE)
_PUNCTUATION = re.compile(r"[^\w\s]")


def is_yes_or_no(text: str) -> bool:
    """
    Whether the answer begins with the word yes or no, in any case; answers that do not are reported as `unparsed`.
    """
    return _PLAIN.match(text.strip()) is not None


def official(text: str) -> Verdict:
    """
    POPE's own rule: the first sentence says no if one of its space-separated words is ``No``, ``not`` or ``no``, else
    yes.

    Everything else is a yes, including ``NO``, ``Nope``, ``**No**``, ``No;``, a refusal and the empty string; a hedge
    such as ``Yes, but not a big one`` is a no. Only the space splits, so ``No\\nThe`` is one word.
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def strict(text: str) -> Verdict | None:
    """The whole answer, lower-cased and stripped, must be the label (lmms-eval): ``No.`` is neither."""
    answer = text.lower().strip()
    return answer if answer in ("yes", "no") else None  # type: ignore[return-value]


def opera(text: str) -> Verdict:
    """OPERA's rule: all sentences, periods and commas deleted, ``NO`` and words ending in ``n't`` are negative too."""
    words = text.replace(".", "").replace(",", "").split(" ")
    negative = any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)
    return "no" if negative else "yes"


def vlmevalkit(text: str) -> Verdict | None:
    """VLMEvalKit's rule: lower-cased, punctuation removed, exactly one of the words yes and no must occur."""
    words = set(_PUNCTUATION.sub(" ", text.lower()).split())
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def gold_substring(text: str, label: Verdict) -> Verdict:
    """
    The rule of VCD, cd_rethink and VAF: right if the lower-cased answer holds the label's letters, wrong otherwise.

    It looks at the label, so an answer that holds both words is always right, and ``I know`` answers a no.
    """
    other: Verdict = "no" if label == "yes" else "yes"
    return label if label in text.lower() else other


def _parser(rule: Callable[[str], Verdict | None]) -> Callable[[str, Mapping[str, Any]], Parsed]:
    return lambda text, doc: Parsed(rule(text), clean=is_yes_or_no(text))


PARSERS: Mapping[str, Callable[[str, Mapping[str, Any]], Parsed]] = {
    "official": _parser(official),
    "strict": _parser(strict),
    "opera": _parser(opera),
    "vlmevalkit": _parser(vlmevalkit),
    "vcd": lambda text, doc: Parsed(gold_substring(text, doc["label"]), clean=is_yes_or_no(text)),
}


def score(verdict: Verdict | None, label: Verdict, split: str) -> dict[str, float]:
    """
    Sufficient statistics of one answer.

    An answer without verdict is wrong and counts as "not yes": it lowers accuracy, and recall if the label is yes.

    Returns
    -------
    dict
        ``correct`` and, prefixed by the split, ``n``, ``tp``, ``fp``, ``fn``, ``tn``.
    """
    said_yes, is_yes = verdict == "yes", label == "yes"
    return {
        "correct": float(verdict == label),
        "n": 1.0,
        f"{split}/n": 1.0,
        f"{split}/tp": float(said_yes and is_yes),
        f"{split}/fp": float(said_yes and not is_yes),
        f"{split}/fn": float(not said_yes and is_yes),
        f"{split}/tn": float(verdict == "no" and not is_yes),
    }


_PER_SPLIT: Sequence[tuple[str, Literal["higher", "neither"]]] = (
    ("accuracy", "higher"),
    ("balanced_accuracy", "higher"),
    ("f1", "higher"),
    ("precision", "higher"),
    ("recall", "higher"),
    ("yes_ratio", "neither"),
)


def metrics(splits: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics `aggregate` returns: means over the splits first (accuracy leads), then every split's own."""
    over_all = tuple(Metric(name, better) for name, better in _PER_SPLIT)
    each = tuple(Metric(f"{split}/{name}", better) for split in splits for name, better in _PER_SPLIT)
    return over_all + each


def aggregate(totals: Mapping[str, np.ndarray], splits: Sequence[str]) -> dict[str, np.ndarray]:
    """
    Accuracy, balanced accuracy (mean of the shares of yes and of no that are answered right), precision, recall, F1 and
    share of predicted yes, per split and as the mean over the splits that have answers.

    The mean of the three F1 values is what "POPE 85.9" of LLaVA-1.5 refers to. Precision, recall and F1 are 0 where
    nothing was predicted or nothing is there.

    Parameters
    ----------
    totals
        Sums of `score` over documents; scalars or arrays of one shape.
    splits
        Names to look for.
    """
    result: dict[str, np.ndarray] = {}
    zero = np.zeros(np.shape(totals["n"]))
    for split in splits:
        n, tp, fp, fn, tn = (np.asarray(totals.get(f"{split}/{key}", zero)) for key in ("n", "tp", "fp", "fn", "tn"))
        precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
        result |= {
            f"{split}/accuracy": ratio(tp + tn, n),
            f"{split}/balanced_accuracy": (recall + ratio(tn, n - tp - fn)) / 2,
            f"{split}/f1": ratio(2 * precision * recall, precision + recall),
            f"{split}/precision": precision,
            f"{split}/recall": recall,
            f"{split}/yes_ratio": ratio(tp + fp, n),
        }
    # A split without answers (a limited run, or a bootstrap draw that missed it) must not pull the mean down.
    present = sum((np.asarray(totals.get(f"{split}/n", zero)) > 0).astype(float) for split in splits)
    means = {
        name: ratio(sum((result[f"{split}/{name}"] for split in splits), start=zero), present) for name, _ in _PER_SPLIT
    }
    return means | result


def pope_score(verdict: Verdict | None, doc: Mapping[str, Any]) -> dict[str, float]:
    """`score` of a document that has a ``label`` and a ``split``."""
    return score(verdict, doc["label"], doc["split"])


def pope_aggregate(totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`aggregate` over POPE's three splits."""
    return aggregate(totals, POPE_SPLITS)
