"""Correlations and their bootstrap intervals, in numpy.

The bootstrap draws whole features, not pairs: what one feature does to several targets
is not independent.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

__all__ = ["bootstrap", "pearson", "ranks", "spearman"]


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[place]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation; nan if a side does not vary or there are under 3 pairs."""
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if len(x) < 3:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float((x @ y) / size) if size > 0 else float("nan")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank."""
    return pearson(ranks(np.ravel(x)), ranks(np.ravel(y)))


def bootstrap(
    measure: Callable[[np.ndarray, np.ndarray], float],
    x: np.ndarray,
    y: np.ndarray,
    key: jax.Array,
    *,
    n: int = 500,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a correlation, resampling the first axis.

    Args:
      measure: of two arrays of one shape.
      x: first axis independent units.
      y: as `x`.
      key: PRNG key.
      n: resamples.
      level: of the interval.
    """
    if len(x) < 3:
        return float("nan"), float("nan")
    draw = np.asarray(jax.random.randint(key, (n, len(x)), 0, len(x)))
    with np.errstate(invalid="ignore"):
        found = np.array([measure(x[i], y[i]) for i in draw])
    tail = (1 - level) / 2
    low, high = (
        np.nanquantile(found, [tail, 1 - tail])
        if np.isfinite(found).any()
        else (np.nan, np.nan)
    )
    return float(low), float(high)
