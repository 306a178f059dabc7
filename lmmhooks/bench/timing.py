"""Interleaved timing: every round runs all alternatives once, and only numbers of the same round are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lmmhooks.metering import synchronizer

__all__ = ["Spread", "interleave", "paired_ratio", "spread", "synchronizer"]

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """
    Median and quartiles of repeated measurements.

    Attributes
    ----------
    median, low, high
        Median, first and third quartile, in the unit of what was measured.
    """

    median: float
    low: float
    high: float


def interleave(actions: Mapping[str, Callable[[], T]], repeat: int, warmup: int = 1) -> dict[str, list[T]]:
    """
    Run alternatives in turn (A B C, B C A, ...), so that a machine that slows down slows all of them.

    Parameters
    ----------
    actions
        What to run, by name; each returns its own measurement.
    repeat
        Rounds that count.
    warmup
        Rounds before those, whose results are dropped.

    Returns
    -------
    dict
        Per name the results, one per round.
    """
    names = list(actions)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(warmup + repeat):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = actions[name]()
            if number >= warmup:
                results[name].append(result)
    return results


def spread(values: Sequence[float]) -> Spread:
    """Summarise repeated measurements; one value is its own spread."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(values: Sequence[float], references: Sequence[float]) -> Spread:
    """Summarise the ratios within the rounds (not the ratio of the medians)."""
    return spread([value / reference for value, reference in zip(values, references, strict=True)])
