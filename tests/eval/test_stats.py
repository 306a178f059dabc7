"""Paired statistics against values computed by hand or by brute force."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from lmmhooks_eval import stats


def test_flips_count_the_four_cells() -> None:
    flips = stats.Flips.count([1, 1, 0, 0, 0], [1, 0, 1, 1, 0])
    assert (flips.both_right, flips.fixed, flips.broken, flips.both_wrong) == (1, 2, 1, 1)
    assert flips.net == pytest.approx(1 / 5)
    assert flips.discordant == pytest.approx(3 / 5)


def test_flips_of_nothing_are_zero() -> None:
    flips = stats.Flips.count([], [])
    assert (flips.net, flips.discordant) == (0.0, 0.0)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 5), (2, 7), (7, 2), (10, 1), (3, 4)])
def test_mcnemar_is_the_exact_binomial_tail(fixed: int, broken: int) -> None:
    n = fixed + broken
    tail = sum(Fraction(math.comb(n, j), 2**n) for j in range(min(fixed, broken) + 1))
    assert stats.mcnemar(fixed, broken) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    mid = 2 * tail - Fraction(math.comb(n, min(fixed, broken)), 2**n)
    assert stats.mcnemar(fixed, broken, mid_p=True) == pytest.approx(float(min(Fraction(1), mid)), rel=1e-12)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (4, 4)])
def test_mcnemar_without_evidence_is_one(fixed: int, broken: int) -> None:
    assert stats.mcnemar(fixed, broken) == stats.mcnemar(fixed, broken, mid_p=True) == 1.0


def test_paired_test_chooses_by_the_scores() -> None:
    name, p = stats.paired_test(np.array([1.0, 0, 0, 0, 0, 0]), np.array([0.0, 1, 1, 1, 1, 1]))
    assert (name, p) == ("mcnemar-exact", pytest.approx(stats.mcnemar(5, 1)))
    before, after = np.array([0.3, 0.6, 0.0, 1.0]), np.array([0.6, 0.6, 0.3, 0.9])
    # Student's t with 3 degrees of freedom has a closed form; d = (.3, 0, .3, -.1) has mean .125 and variance .0425.
    angle = math.atan(0.125 / math.sqrt(0.0425 / 4) / math.sqrt(3))
    name, p = stats.paired_test(before, after)
    assert name == "paired-t"
    assert p == pytest.approx(1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle)))


def test_paired_test_without_spread_claims_nothing() -> None:
    assert stats.paired_test(np.array([0.3, 0.5]), np.array([0.3, 0.5])) == ("paired-t", 1.0)


def test_wilson_matches_the_formula() -> None:
    n, k, z = 40, 34, 1.959963984540054
    share = k / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert stats.wilson(k, n) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_holm_steps_down_and_stays_monotone() -> None:
    # Sorted: .01 * 4, .02 * 3, then max(.06, .03 * 2), then max(.06, .9).
    assert stats.holm([0.02, 0.9, 0.01, 0.03]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert stats.holm([]) == []
    assert stats.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])


def test_clustered_se_with_singletons_is_the_ordinary_one() -> None:
    differences = np.array([1.0, 0.0, -1.0, 1.0, 1.0])
    expected = differences.std(ddof=1) / math.sqrt(5)
    assert stats.clustered_se(differences, list("abcde")) == pytest.approx(expected)


def test_clustered_se_grows_when_a_cluster_moves_together() -> None:
    # Deviations are +-1/2: var = 4 * 1/4 / 3 = 1/3; each cluster adds (1)^2 - 2/4 = 1/2.
    differences = np.array([1.0, 1.0, 0.0, 0.0])
    assert stats.clustered_se(differences, list("aabb")) == pytest.approx(math.sqrt(1 / 12 + 1 / 16))
    assert stats.clustered_se(np.array([1.0, 0.0, 1.0, 0.0]), list("aabb")) == pytest.approx(math.sqrt(1 / 12 - 1 / 16))


def _means(totals: np.ndarray) -> dict[str, np.ndarray]:
    return {"mean": totals[0] / totals[1]}


def test_bootstrap_agrees_with_enumerating_every_resample() -> None:
    baseline = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 3.0]])
    patched = np.array([[2.0, 2.0], [1.0, 1.0], [0.0, 3.0]])
    exact = [
        float(_means(patched[list(rows)].sum(0))["mean"] - _means(baseline[list(rows)].sum(0))["mean"])
        for rows in product(range(3), repeat=3)
    ]
    estimate = stats.paired_bootstrap(baseline, patched, _means, draws=20_000, seed=1)["mean"]
    assert estimate.difference == pytest.approx(3 / 6 - 4 / 6)
    # Percentiles of a distribution on 27 equally likely points: with 20,000 draws they land on the exact points.
    low, high = np.quantile(exact, [0.025, 0.975], method="inverted_cdf")
    assert estimate.difference_interval == (pytest.approx(low), pytest.approx(high))
    # Standard error of a proportion with 20,000 draws is at most .0035 per tail; doubled and with three of them .02.
    beyond = min(np.mean(np.array(exact) <= 0), np.mean(np.array(exact) >= 0))
    assert estimate.p == pytest.approx(min(1.0, 2 * beyond), abs=0.02)


def test_bootstrap_is_seeded_and_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    a = np.stack([generator.integers(0, 3, 30), np.full(30, 3)], axis=1).astype(float)
    b = np.stack([generator.integers(0, 3, 30), np.full(30, 3)], axis=1).astype(float)
    first = stats.paired_bootstrap(a, b, _means, draws=1500, seed=3)
    monkeypatch.setattr(stats, "_DRAWS_AT_ONCE", 100)
    assert stats.paired_bootstrap(a, b, _means, draws=1500, seed=3) == first
    assert stats.paired_bootstrap(a, b, _means, draws=1500, seed=4) != first


def test_bootstrap_of_a_variant_that_changes_nothing_has_no_width() -> None:
    rows = np.array([[1.0, 2.0], [2.0, 2.0], [0.0, 1.0]])
    estimate = stats.paired_bootstrap(rows, rows, _means, draws=200)["mean"]
    assert (estimate.difference, estimate.difference_interval, estimate.p) == (0.0, (0.0, 0.0), 1.0)


def test_bootstrap_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="equal, non-empty"):
        stats.paired_bootstrap(np.zeros((2, 1)), np.zeros((3, 1)), _means)
    with pytest.raises(ValueError, match="equal, non-empty"):
        stats.paired_bootstrap(np.zeros((0, 1)), np.zeros((0, 1)), _means)


def test_power_of_the_sheets_example() -> None:
    # "q = 8 %, delta = 1 %: about 6,300 items".
    assert stats.items_needed(0.01, 0.08) == pytest.approx(6300, rel=0.01)
    found = stats.detectable_change(6300, 0.08)
    assert found == pytest.approx(0.01, rel=0.01)
    assert stats.items_needed(found, 0.08) == pytest.approx(6300)


def test_power_says_when_nothing_can_be_shown() -> None:
    assert stats.detectable_change(0, 0.1) is None
    assert stats.detectable_change(100, 0.0) is None
    assert stats.detectable_change(3, 0.1) is None
