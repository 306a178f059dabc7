"""
Can a model tell yes from no at all, whatever it leans to?

Accuracy mixes two things: how well documents are ranked, and where the line between the answers is drawn. The area
under the curve (AUC) of the margin between the two answers measures the ranking alone; a number added to every margin
(`best_offset`) moves the line alone. A method that only shifts answers in one direction changes no ranking, and cannot
beat the best offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Ranking", "best_offset"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """
    Pairs of documents that are ranked the right way round, by cluster, so that clusters can be resampled.

    Parameters
    ----------
    won
        ``[C, C]``: pairs of a positive document of one cluster and a negative one of another in which the positive has
        the larger margin; equal margins count half.
    positive, negative
        ``[C]`` documents of each kind.
    """

    won: np.ndarray
    positive: np.ndarray
    negative: np.ndarray

    @classmethod
    def of(cls, margins: np.ndarray, is_positive: np.ndarray, cluster: np.ndarray, clusters: int) -> Ranking:
        """
        Count pairs.

        Parameters
        ----------
        margins
            ``[n]``, larger for the positive answer.
        is_positive
            ``[n]`` bool: which documents have it for their right answer.
        cluster
            ``[n]`` in ``[0, clusters)``.
        clusters
            C.
        """
        above, below = margins[is_positive][:, None], margins[~is_positive][None]
        pairs = (above > below) + 0.5 * (above == below)
        cells = cluster[is_positive][:, None] * clusters + cluster[~is_positive][None]
        won = np.bincount(cells.ravel(), weights=pairs.ravel(), minlength=clusters**2).reshape(clusters, clusters)
        positive, negative = (np.bincount(cluster[kind], minlength=clusters) for kind in (is_positive, ~is_positive))
        return cls(won, positive.astype(float), negative.astype(float))

    @property
    def defined(self) -> bool:
        """Whether there are documents of both kinds."""
        return bool(self.positive.any() and self.negative.any())

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """
        Area under the ROC curve ``[n]`` in [0, 1] where clusters count ``weights [n, C]`` times.

        0.5, a coin, for a resample with documents of one kind alone.
        """
        won = ((weights @ self.won) * weights).sum(axis=1)
        pairs = (weights @ self.positive) * (weights @ self.negative)
        return np.divide(won, pairs, out=np.full(len(weights), 0.5), where=pairs > 0)


def best_offset(margins: Sequence[float] | np.ndarray, is_positive: Sequence[bool] | np.ndarray) -> float:
    """
    The number that added to every margin makes most answers right, an answer being positive above 0.

    Parameters
    ----------
    margins
        ``[n]``, n at least 1.
    is_positive
        ``[n]``: which documents have the positive answer for their right one.

    Returns
    -------
    float
        Half way between two margins, or one beyond all of them; of equally good ones the one nearest to 0, which is 0
        itself where nothing is gained.
    """
    values, truth = np.asarray(margins, dtype=float), np.asarray(is_positive, dtype=bool)
    steps = np.unique(values)
    lines = np.concatenate([[steps[0] - 1], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 1], [0.0]])
    right = ((values[None] > lines[:, None]) == truth[None]).sum(axis=1)
    best = lines[right == right.max()]
    return float(-best[np.abs(best).argmin()]) + 0.0
