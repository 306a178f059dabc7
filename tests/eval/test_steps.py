"""Where answers part from the baseline's, and where a cut leaves nothing to choose."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lmmhooks_eval.score import score_run
from lmmhooks_eval.steps import divergence, one_token_share, step_figures
from tests.eval.runs import answer, documents, write_run


def test_first_and_later_tokens_are_told_apart() -> None:
    before = [{"tokens": [1, 2, 3]}, {"tokens": [1, 2, 3]}, {"tokens": [4]}, {"tokens": [7, 8]}, {}]
    after = [{"tokens": [1, 2, 3]}, {"tokens": [9, 2, 3]}, {"tokens": [4, 5]}, {"tokens": [7, 9]}, {"tokens": [1]}]
    assert divergence(before, after) == {"n": 4, "first": 0.25, "later": 0.5, "tokens": pytest.approx(3 / 10)}
    assert divergence([{}], [{"tokens": [1]}]) is None


def test_a_cut_leaves_one_token_where_the_gap_exceeds_it() -> None:
    rows = [{"gaps": [math.log(10) + 0.01, math.log(10) - 0.01]}, {"gaps": [0.0, 5.0, math.log(2) + 0.01]}, {}]
    assert one_token_share(rows, 0.1) == 2 / 5
    assert one_token_share(rows, 0.5) == 4 / 5
    assert one_token_share([{}], 0.1) is None


def test_figures_of_a_variant_use_its_own_cut_on_the_steps_of_the_baseline() -> None:
    reference = [{"gaps": [1.0, 3.0]}]
    own = [
        {"batch_cut": 0.5, "batch_branch_steps": 0.25, "new_tokens": 4},
        {"batch_cut": 0.5, "batch_branch_steps": 1.0, "new_tokens": 2},
    ]
    assert step_figures(reference, own) == {"cut": 0.5, "one_token": 1.0, "branch_steps": 0.5}
    assert step_figures(reference, [{"new_tokens": 2}]) == {"cut": None, "one_token": 0.5, "branch_steps": None}


def test_a_scored_run_holds_both(tmp_path: Path) -> None:
    docs = documents()
    lines = [{**answer(doc, "baseline", "Yes"), "tokens": [5, 2], "gaps": [3.0, 1.0]} for doc in docs]
    lines += [{**answer(doc, "v", "Yes"), "tokens": [6, 2], "batch_cut": 0.5} for doc in docs]
    task = score_run(write_run(tmp_path / "run", lines))["tasks"]["scenes-pope"]
    assert task["steps"] == {"cut": 0.1, "one_token": 0.5}
    figures = task["variants"]["v"]
    assert figures["divergence"] == {"n": len(docs), "first": 1.0, "later": 0.0, "tokens": 0.5}
    assert figures["steps"] == {"cut": 0.5, "one_token": 1.0, "branch_steps": None}
