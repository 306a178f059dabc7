"""POPE: parsers on the answers that separate them, metrics by hand, and the real LLaVA-1.5 answers end to end."""

from __future__ import annotations

import numpy as np
import pytest

from lmmhooks_eval import stats
from lmmhooks_eval.metrics import yesno
from tests.eval.shared import read_lines

SPLITS = ("random", "popular", "adversarial")

YES_OFFICIALLY = [
    "NO", "Nope", "None", '"No"', "**No**", "No;", "No\nThe image", "There isn't one.", "It's a cat. There is no dog.",
    "", "I cannot help with that.", ".No", "Yes", "yes, there is",
]  # fmt: skip
NO_OFFICIALLY = ["No", "no", "No.", "No, there is not.", "Yes, but not a big one", "I do not know", "There is no dog."]


@pytest.mark.parametrize("text", YES_OFFICIALLY)
def test_official_parser_says_yes(text: str) -> None:
    assert yesno.official(text) == "yes"


@pytest.mark.parametrize("text", NO_OFFICIALLY)
def test_official_parser_says_no(text: str) -> None:
    assert yesno.official(text) == "no"


@pytest.mark.parametrize(
    ("text", "strict", "opera", "vlmevalkit"),
    [
        ("No.", None, "no", "no"),
        ("NO", "no", "no", "no"),
        (" Yes ", "yes", "yes", "yes"),
        ("There isn't one", None, "no", None),
        ("It's a cat. There is no dog.", None, "no", "no"),
        ("yes or no", None, "no", None),
        ("**Yes**", None, "yes", "yes"),
        ("", None, "yes", None),
    ],
)
def test_variants_differ_where_the_sheet_says(text: str, strict: str, opera: str, vlmevalkit: str) -> None:
    assert (yesno.strict(text), yesno.opera(text), yesno.vlmevalkit(text)) == (strict, opera, vlmevalkit)


@pytest.mark.parametrize(
    ("text", "clean"), [("Yes", True), ("no, there", True), ("Nope", False), ("", False), ("\nNo", True)]
)
def test_unparsed_answers_are_flagged_whatever_the_parser(text: str, clean: bool) -> None:
    assert {parse(text, {"label": "yes"}).clean for parse in yesno.PARSERS.values()} == {clean}


@pytest.mark.parametrize(
    ("text", "label", "verdict"),
    [
        ("Yes.", "yes", "yes"),
        ("Yes.", "no", "yes"),
        ("No", "no", "no"),
        ("No", "yes", "no"),
        ("Yes or no", "yes", "yes"),
        ("Yes or no", "no", "no"),
        ("I know", "no", "no"),
        ("", "yes", "no"),
        ("", "no", "yes"),
    ],
)
def test_the_rule_that_looks_at_the_label(text: str, label: str, verdict: str) -> None:
    assert yesno.PARSERS["vcd"](text, {"label": label}).value == verdict


def _totals(rows: list[tuple[str | None, str, str]]) -> dict[str, np.ndarray]:
    totals: dict[str, float] = {}
    for verdict, label, split in rows:
        for name, value in yesno.score(verdict, label, split).items():  # type: ignore[arg-type]
            totals[name] = totals.get(name, 0.0) + value
    return {name: np.asarray(value) for name, value in totals.items()}


def test_metrics_by_hand() -> None:
    # tp 2, fp 1, fn 1, tn 1: precision 2/3, recall 2/3, accuracy 3/5, predicted yes 3/5.
    rows = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]
    figures = yesno.aggregate(_totals([(a, b, "random") for a, b in rows]), SPLITS)
    assert float(figures["random/precision"]) == pytest.approx(2 / 3)
    assert float(figures["random/recall"]) == pytest.approx(2 / 3)
    assert float(figures["random/f1"]) == pytest.approx(2 / 3)
    assert float(figures["accuracy"]) == pytest.approx(3 / 5)  # absent splits do not count in the mean
    assert float(figures["yes_ratio"]) == pytest.approx(3 / 5)


def test_nothing_predicted_yes_is_zero_and_not_an_error() -> None:
    figures = yesno.aggregate(_totals([("no", "yes", "random"), ("no", "no", "random")]), SPLITS)
    assert [float(figures[f"random/{name}"]) for name in ("precision", "recall", "f1", "accuracy")] == [0, 0, 0, 0.5]


def test_an_answer_without_verdict_is_wrong_on_either_label() -> None:
    figures = yesno.aggregate(
        _totals([(None, "yes", "random"), (None, "no", "random"), ("yes", "yes", "random")]), SPLITS
    )
    assert float(figures["random/accuracy"]) == pytest.approx(1 / 3)
    assert float(figures["random/recall"]) == pytest.approx(1 / 2)
    assert float(figures["random/precision"]) == pytest.approx(1.0)


def test_aggregate_is_elementwise() -> None:
    single = [_totals([("yes", "yes", "random")]), _totals([("yes", "no", "random")])]
    stacked = {name: np.stack([totals[name] for totals in single]) for name in single[0]}
    together = yesno.aggregate(stacked, SPLITS)
    for index, totals in enumerate(single):
        for name, value in yesno.aggregate(totals, SPLITS).items():
            assert float(together[name][index]) == float(value)


# Figures recomputed with the official script from the real answers.
REAL = {
    "random": {"greedy": (87.0, 85.50), "sample": 83.63, "broken": 175, "fixed": 74},
    "popular": {"greedy": (85.9, 84.47), "sample": 81.73, "broken": 207, "fixed": 82},
    "adversarial": {"greedy": (83.33, 82.12), "sample": 79.83, "broken": 215, "fixed": 110},
}


def _real(split: str, decoding: str) -> tuple[list[dict[str, float]], list[str]]:
    answers = {
        row["question_id"]: row["text"] for row in read_lines(f"pope/answers_llava15_7b_{decoding}_{split}.jsonl.gz")
    }
    questions = read_lines(f"pope/coco_{split}.jsonl")
    scores = [yesno.score(yesno.official(answers[q["question_id"]]), q["label"], split) for q in questions]
    return scores, [question["image"] for question in questions]


@pytest.mark.parametrize("split", SPLITS)
def test_real_pope_answers_give_the_published_figures(split: str) -> None:
    greedy, _ = _real(split, "greedy")
    sampled, _ = _real(split, "sample")
    figures = [
        yesno.aggregate({name: np.asarray(sum(row[name] for row in rows)) for name in rows[0]}, (split,))
        for rows in (greedy, sampled)
    ]
    # The reference figures have one or two decimals of a percentage.
    assert 100 * float(figures[0]["accuracy"]) == pytest.approx(REAL[split]["greedy"][0], abs=0.05)
    assert 100 * float(figures[0]["f1"]) == pytest.approx(REAL[split]["greedy"][1], abs=0.005)
    # One recall is known for all three splits; a few of the same 1,500 questions were answered differently.
    assert 100 * float(figures[0]["recall"]) == pytest.approx(76.7, abs=0.2)
    assert 100 * float(figures[1]["accuracy"]) == pytest.approx(REAL[split]["sample"], abs=0.005)


@pytest.mark.parametrize("split", SPLITS)
def test_real_pope_pairs_give_the_published_flips_and_intervals(split: str) -> None:
    (greedy, images), (sampled, _) = _real(split, "greedy"), _real(split, "sample")
    before, after = (np.array([row["correct"] for row in rows]) for rows in (greedy, sampled))
    flips = stats.Flips.count(before, after)
    assert (flips.broken, flips.fixed) == (REAL[split]["broken"], REAL[split]["fixed"])
    assert stats.mcnemar(flips.fixed, flips.broken) < 1e-8
    clusters = sorted(set(images))
    row = {image: index for index, image in enumerate(clusters)}
    totals = np.zeros((2, len(clusters), 2))
    for image, a, b in zip(images, before, after, strict=True):
        totals[0, row[image]] += (a, 1)
        totals[1, row[image]] += (b, 1)
    estimate = stats.paired_bootstrap(totals[0], totals[1], lambda t: {"accuracy": t[0] / t[1]})["accuracy"]
    low, high = estimate.difference_interval
    assert 100 * estimate.difference == pytest.approx(-100 * (flips.broken - flips.fixed) / 3000)
    assert 2.0 < 100 * (high - low) < 2.5  # "95 % about +-1.0-1.2"
    half = 1.96 * stats.clustered_se(after - before, images)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)  # two estimates of one spread, 10,000 draws
