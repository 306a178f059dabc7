"""Ranking and leaning of yes/no answers, held against scikit-free renderings of their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lmmhooks_eval.bias import AUC, TUNED_OFFSET, offset_answers
from lmmhooks_eval.metrics.discrimination import Ranking, best_offset
from lmmhooks_eval.recipes import build
from lmmhooks_eval.score import score_run, scored_answers
from lmmhooks_eval.store import read_config, read_samples
from lmmhooks_eval.tasks import get_task, open_task
from tests.eval.runs import answer, documents, write_run


def _made_up(seed: int, n: int = 60, clusters: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    margins = np.round(rng.normal(size=n) + positive, 1)  # rounded, so that there are ties
    return margins, positive, rng.integers(clusters, size=n)


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_the_mann_whitney_statistic(seed: int) -> None:
    margins, positive, cluster = _made_up(seed)
    ranking = Ranking.of(margins, positive, cluster, 7)
    u = scipy_stats.mannwhitneyu(margins[positive], margins[~positive]).statistic
    expected = u / (positive.sum() * (~positive).sum())
    assert ranking.auc(np.ones((1, 7)))[0] == pytest.approx(expected, abs=1e-12)


def test_resampled_auc_is_that_of_the_repeated_documents() -> None:
    margins, positive, cluster = _made_up(5)
    ranking = Ranking.of(margins, positive, cluster, 7)
    weights = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=20).astype(float)
    for weight, found in zip(weights, ranking.auc(weights), strict=True):
        again = np.concatenate([np.repeat(np.flatnonzero(cluster == c), int(weight[c])) for c in range(7)])
        m, p = margins[again], positive[again]
        above, below = m[p][:, None], m[~p][None]
        expected = ((above > below) + 0.5 * (above == below)).mean() if p.any() and (~p).any() else 0.5
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_shift_changes_no_ranking_and_a_monotone_map_neither() -> None:
    margins, positive, cluster = _made_up(1)
    once = np.ones((1, 7))
    aucs = [Ranking.of(values, positive, cluster, 7).auc(once) for values in (margins, margins + 3, np.exp(margins))]
    assert aucs[0] == aucs[1] == aucs[2]
    assert Ranking.of(-margins, positive, cluster, 7).auc(once) == pytest.approx(1 - aucs[0])
    assert not Ranking.of(margins, np.ones_like(positive), cluster, 7).defined


@pytest.mark.parametrize("seed", range(4))
def test_the_best_offset_is_as_good_as_any(seed: int) -> None:
    margins, positive, _ = _made_up(seed)

    def right(offset: float) -> int:
        return int(((margins + offset > 0) == positive).sum())

    best = best_offset(margins, positive)
    tried = np.linspace(-6, 6, 2401) + 1e-3
    assert right(best) == max(right(offset) for offset in tried)
    as_good = [abs(offset) for offset in tried if right(offset) == right(best)]
    assert abs(best) <= min(as_good) + 0.05 + 1e-9, "half way between margins a tenth apart, at most"


def test_nothing_to_gain_is_no_offset() -> None:
    assert best_offset([2.0, -1.0, 0.5], [True, False, True]) == 0.0
    assert best_offset([-2.0, -1.0], [True, True]) == 3.0
    assert best_offset([-2.0, -1.0, -3.0], [True, True, False]) == pytest.approx(2.5)


def _lines(docs: list[dict[str, Any]], variant: str, margin: Any) -> list[dict[str, Any]]:
    """Answers that say what their margin says."""
    return [
        {
            **answer(doc, variant, "Yes" if margin(doc) > 0 else "No"),
            "margin": margin(doc),
            "key": f"{variant}/{doc['id']}",
        }
        for doc in docs
    ]


def _timid(doc: dict[str, Any]) -> float:
    """Ranks all documents the right way round and says yes to none."""
    return -1.0 if doc["label"] == "yes" else -2.0


def _blind(doc: dict[str, Any]) -> float:
    return -1.5


def _bold(doc: dict[str, Any]) -> float:
    return _timid(doc) + 5


@pytest.fixture
def run(tmp_path: Path) -> Path:
    # From the start of the file, where every image has its share of every split and label.
    docs = [dict(doc) for doc in get_task("scenes-pope").load()[:200]]
    lines = _lines(docs, "baseline", _timid) + _lines(docs, "blind", _blind) + _lines(docs, "bold", _bold)
    return write_run(tmp_path / "run", lines, variants={"blind": ["var"], "bold": ["vcd"]})


def test_auc_stands_beside_accuracy_and_tells_them_apart(run: Path) -> None:
    task = score_run(run)["tasks"]["scenes-pope"]
    found = {name: figures["metrics"][AUC] for name, figures in task["variants"].items()}
    assert found["baseline"]["value"] == 1.0
    assert found["baseline"]["difference"] == 0.0
    assert found["bold"]["value"] == 1.0, "leaning the other way ranks nothing anew"
    assert found["blind"]["value"] == 0.5
    assert found["blind"]["difference_interval"] == [-0.5, -0.5]
    # No variant knows anything that accuracy would show: all but one half of the labels are missed by each.
    shares = [task["variants"][name]["metrics"]["balanced_accuracy"]["value"] for name in ("baseline", "blind", "bold")]
    assert shares == [0.5, 0.5, 0.5]
    assert {f"{split}/{AUC}" for split in ("random", "popular", "adversarial")} <= task["metrics"].keys()


def test_the_tuned_offset_is_a_control_of_its_own(run: Path) -> None:
    control = score_run(run)["tasks"]["scenes-pope"]["controls"][TUNED_OFFSET]
    assert control["offsets"] == [1.5, 1.5]
    assert control["metrics"]["accuracy"]["value"] == 1.0
    assert control["flips"]["broken"] == 0
    assert "p_holm" in control["test"]
    assert AUC not in control["metrics"]


def test_an_offset_is_used_on_images_it_was_not_tuned_on(run: Path) -> None:
    recipe = build(read_config(run), "test")
    [plan] = recipe.tasks
    task = open_task(plan)
    baseline = scored_answers(read_samples(run), plan, task)["baseline"]
    clusters = sorted({scored.record["cluster"] for scored in baseline.values()})
    # One image answered as if its margins were far off: only the half without it may pay for it.
    odd = clusters[0]
    for scored in baseline.values():
        if scored.record["cluster"] == odd:
            scored.record["margin"] += 40.0
    found = offset_answers(task, baseline, 0)
    assert found is not None
    answers, _ = found
    assert list(answers) == list(baseline)
    assert {scored.record["text"] for doc, scored in answers.items() if scored.record["cluster"] == odd} == {"Yes"}
    others = [scored for scored in answers.values() if scored.record["cluster"] != odd]
    assert all(scored.score["correct"] for scored in others)


def test_answers_without_margins_are_scored_as_before(tmp_path: Path) -> None:
    docs = documents()
    lines = [answer(doc, name, "Yes") for name in ("baseline", "v") for doc in docs]
    task = score_run(write_run(tmp_path / "run", lines))["tasks"]["scenes-pope"]
    assert task["controls"] == {}
    assert AUC not in task["metrics"]
    assert AUC not in task["variants"]["v"]["metrics"]
    assert get_task("scenes-caption").answer_words is None
