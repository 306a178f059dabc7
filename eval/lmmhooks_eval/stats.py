"""
Paired statistics: a patched model against its own baseline on the same documents.

Everything here takes plain numbers and arrays and knows no task. Exact McNemar test, cluster bootstrap on
sufficient statistics, Wilson interval, Holm correction, clustered standard error, and the number of documents that a
difference needs to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

__all__ = [
    "Estimate",
    "Flips",
    "clustered_se",
    "detectable_change",
    "holm",
    "items_needed",
    "mcnemar",
    "paired_bootstrap",
    "paired_resampling",
    "paired_test",
    "wilson",
]

# Draws are made in slices so that memory stays at slice x clusters integers whatever the number of draws.
_DRAWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Flips:
    """
    What changed between two yes/no outcomes of the same documents.

    Parameters
    ----------
    both_right, fixed, broken, both_wrong
        Numbers of documents: right in both, wrong then right, right then wrong, wrong in both.
    """

    both_right: int
    fixed: int
    broken: int
    both_wrong: int

    @classmethod
    def count(cls, baseline: Sequence[bool] | np.ndarray, patched: Sequence[bool] | np.ndarray) -> Flips:
        """Count the four cells; the sequences are aligned, one entry per document, true for success."""
        a, b = np.asarray(baseline, dtype=bool), np.asarray(patched, dtype=bool)
        return cls(int((a & b).sum()), int((~a & b).sum()), int((a & ~b).sum()), int((~a & ~b).sum()))

    @property
    def total(self) -> int:
        """Number of documents."""
        return self.both_right + self.fixed + self.broken + self.both_wrong

    @property
    def net(self) -> float:
        """(fixed - broken) / total, in [-1, 1]; 0 for no documents."""
        return (self.fixed - self.broken) / self.total if self.total else 0.0

    @property
    def discordant(self) -> float:
        """Share of documents whose outcome differs, in [0, 1]."""
        return (self.fixed + self.broken) / self.total if self.total else 0.0


def mcnemar(fixed: int, broken: int, mid_p: bool = False) -> float:
    """
    Exact McNemar test: is a discordant document as likely fixed as broken?

    Parameters
    ----------
    fixed, broken
        Discordant counts.
    mid_p
        Take half of the observed outcome's probability off, which makes the test less conservative.

    Returns
    -------
    float
        Two-sided p in (0, 1]; 1 if nothing is discordant.
    """
    n, least = fixed + broken, min(fixed, broken)
    if n == 0 or fixed == broken:
        return 1.0
    p = 2 * stats.binom.cdf(least, n, 0.5)
    if mid_p:
        p -= stats.binom.pmf(least, n, 0.5)
    return float(min(1.0, p))


def paired_test(baseline: np.ndarray, patched: np.ndarray, mid_p: bool = False) -> tuple[str, float]:
    """
    The test that fits the scores: McNemar for outcomes that are all 0 or 1, a paired t-test for fractions.

    Parameters
    ----------
    baseline, patched
        Aligned scores in [0, 1], one per document.

    Returns
    -------
    tuple
        Name of the test and its two-sided p; p is 1 where no document differs.
    """
    if np.isin(baseline, (0, 1)).all() and np.isin(patched, (0, 1)).all():
        flips = Flips.count(baseline, patched)
        return ("mcnemar-mid-p" if mid_p else "mcnemar-exact"), mcnemar(flips.fixed, flips.broken, mid_p)
    difference = patched - baseline
    if len(difference) < 2 or np.ptp(difference) == 0:
        # No spread: the t statistic is 0/0 or infinite. A constant shift of zero is no evidence, any other cannot be
        # judged.
        return "paired-t", 1.0
    return "paired-t", float(stats.ttest_rel(patched, baseline).pvalue)


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) if there is nothing to estimate from."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(round(successes), n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Holm's step-down correction of a family of p values.

    Parameters
    ----------
    p_values
        Every test of the family, in any order.

    Returns
    -------
    list of float
        Adjusted values in the same order, monotone in the original ones and at most 1.
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def clustered_se(differences: np.ndarray, clusters: Sequence[str]) -> float:
    """
    Standard error of a mean difference whose documents come in dependent clusters.

    ``SE^2 = var(d)/n + 1/n^2 * sum over clusters of [(sum dev)^2 - sum dev^2]``; the cross term may be negative and is
    kept, the total is floored at 0.

    Parameters
    ----------
    differences
        Patched minus baseline score, one per document.
    clusters
        Cluster of each document.
    """
    n = len(differences)
    if n < 2:
        return 0.0
    deviations = differences - differences.mean()
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, squares = np.bincount(index, deviations), np.bincount(index, deviations**2)
    variance = differences.var(ddof=1) / n + float((sums**2 - squares).sum()) / n**2
    return math.sqrt(max(0.0, variance))


@dataclass(frozen=True)
class Estimate:
    """
    One metric of a patched model beside its baseline.

    Parameters
    ----------
    value, interval
        The patched figure and its percentile interval.
    baseline, baseline_interval
        The same of the baseline, on the same documents.
    difference, difference_interval
        Patched minus baseline, resampled in pairs.
    p
        Two-sided bootstrap p of the difference, at least ``1 / (draws + 1)``.
    """

    value: float
    interval: tuple[float, float]
    baseline: float
    baseline_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    p: float


def paired_bootstrap(
    baseline: np.ndarray,
    patched: np.ndarray,
    aggregate: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """
    Resample clusters with replacement and recompute every metric from the resampled totals.

    A draw is one multinomial over the clusters times the matrix of sufficient statistics, so the *reported* metric
    (an F1, a CHAIR_i) is resampled and not a mean that resembles it.

    Parameters
    ----------
    baseline, patched
        Sufficient statistics summed per cluster, shape (clusters, statistics), rows aligned.
    aggregate
        Totals of shape (statistics, ...) to metrics of shape (...).
    draws
        Number of resamples.
    confidence
        Coverage of the percentile intervals, in (0, 1).
    seed
        Of the generator.

    Returns
    -------
    dict
        ``{metric: Estimate}``; for a baseline alone pass the same array twice.

    Raises
    ------
    ValueError
        If the two arrays differ in shape or hold no cluster.
    """
    if baseline.shape != patched.shape or not len(baseline):
        raise ValueError(f"paired statistics need equal, non-empty shapes, got {baseline.shape} and {patched.shape}")
    return paired_resampling(
        len(baseline),
        lambda weights: aggregate((weights @ baseline).T),
        lambda weights: aggregate((weights @ patched).T),
        draws,
        confidence,
        seed,
    )


Figures = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def paired_resampling(
    clusters: int, before: Figures, after: Figures, draws: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Estimate]:
    """
    As `paired_bootstrap`, for figures that are no function of sums over clusters, such as an area under a curve.

    Parameters
    ----------
    clusters
        Number of clusters, at least 1.
    before, after
        ``figures(weights [n, clusters]) -> {metric: [n]}``: how often each cluster counts in each of n resamples to the
        figures of those resamples, of the baseline and of the patched model.
    draws, confidence, seed
        As in `paired_bootstrap`.
    """
    generator = np.random.default_rng(seed)
    drawn: list[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        weights = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(float)
        drawn.append((before(weights), after(weights)))
    once = np.ones((1, clusters))
    point_a, point_b = before(once), after(once)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]

    def interval(values: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(values, tails)
        return float(low), float(high)

    result = {}
    for name in point_a:
        a = np.concatenate([pair[0][name] for pair in drawn])
        b = np.concatenate([pair[1][name] for pair in drawn])
        value, baseline = float(point_b[name][0]), float(point_a[name][0])
        beyond = 1 + min(int((b - a <= 0).sum()), int((b - a >= 0).sum()))
        result[name] = Estimate(
            value=value,
            interval=interval(b),
            baseline=baseline,
            baseline_interval=interval(a),
            difference=value - baseline,
            difference_interval=interval(b - a),
            p=min(1.0, 2 * beyond / (draws + 1)),
        )
    return result


def items_needed(change: float, discordant: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """
    Documents a paired comparison needs to show a net change.

    Parameters
    ----------
    change
        Net change to detect, as a share, in (0, discordant].
    discordant
        Share of documents whose outcome differs.
    alpha, power
        Two-sided error of the first kind and one minus that of the second.
    """
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    spread = math.sqrt(max(0.0, discordant - change**2))
    return float((z_alpha * math.sqrt(discordant) + z_power * spread) ** 2 / change**2)


def detectable_change(n: int, discordant: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest net change `n` documents can show at this share of discordant ones; None if they can show none."""
    if n == 0 or discordant <= 0 or items_needed(discordant, discordant, alpha, power) > n:
        return None
    smallest = math.sqrt(discordant / n) * 1e-3
    return float(
        optimize.brentq(lambda change: items_needed(change, discordant, alpha, power) - n, smallest, discordant)
    )
