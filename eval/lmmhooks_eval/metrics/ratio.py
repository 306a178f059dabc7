"""The one division every metric needs: elementwise, and 0 where there is nothing to divide by."""

from __future__ import annotations

import numpy as np

__all__ = ["ratio"]


def ratio(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """
    ``numerator / denominator`` elementwise, 0 where the denominator is 0.

    Official scorers of several benchmarks raise there instead (a model that never says yes has no precision); 0 is the
    convention of their re-implementations, and bootstrap draws need a number.

    Parameters
    ----------
    numerator, denominator
        Scalars or arrays that broadcast.

    Returns
    -------
    numpy.ndarray
        float64, of the broadcast shape.
    """
    top, bottom = np.broadcast_arrays(np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float))
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)
