"""Correlations, shares and means with their intervals, in numpy.

The bootstrap of a correlation draws whole features, not pairs: what one feature does to
several targets is not independent.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from scipy.special import ndtri

__all__ = [
    "bootstrap",
    "mean_interval",
    "pearson",
    "ranks",
    "ratio_interval",
    "spearman",
    "wilson",
]

_DRAWN = 1 << 22  # random numbers that are held at a time


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


def wilson(hits: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, hits out of n; nan if n is 0.

    The shares p with ``(hits/n - p)² <= z² p (1 - p) / n``: unlike the normal interval
    it stays within 0..1 and has a width at 0 and at n hits.
    """
    if n < 1:
        return float("nan"), float("nan")
    z2 = float(ndtri((1 + level) / 2)) ** 2
    middle = (hits + z2 / 2) / (n + z2)
    half = np.sqrt(z2 * (hits * (n - hits) / n + z2 / 4)) / (n + z2)
    # The ends are exact where rounding would leave them short.
    low = float(middle - half) if hits > 0 else 0.0
    high = float(middle + half) if hits < n else 1.0
    return low, high


def mean_interval(
    x: np.ndarray, key: jax.Array, *, n: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent values.

    Args:
      x: values; nan ones are dropped.
      key: PRNG key.
      n: resamples.
      level: of the interval.

    Returns:
      Lower and upper end; nan if there are fewer than 2 values.
    """
    x = np.asarray(x, np.float64).ravel()
    x = x[~np.isnan(x)]
    return ratio_interval(x, np.ones(len(x)), key, n=n, level=level)


def ratio_interval(
    top_C: np.ndarray,
    bottom_C: np.ndarray,
    key: jax.Array,
    *,
    n: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``sum(top) / sum(bottom)``.

    A weighted mean whose values come in clusters is such a ratio, with the sums of each
    cluster: whole clusters are drawn, since values within one are not independent.

    Args:
      top_C: a value for each independent unit.
      bottom_C: likewise.
      key: PRNG key.
      n: resamples; those whose denominator is 0 are dropped.
      level: of the interval.

    Returns:
      Lower and upper end; nan if there are fewer than 2 units.
    """
    C = len(top_C)
    if C < 2:
        return float("nan"), float("nan")
    rows = min(n, max(1, _DRAWN // C))
    found: list[np.ndarray] = []
    for i in range(-(-n // rows)):
        part = jax.random.fold_in(key, i)
        draw_NC = np.asarray(jax.random.randint(part, (rows, C), 0, C))
        bottom_N = bottom_C[draw_NC].sum(1)
        found.append((top_C[draw_NC].sum(1))[bottom_N != 0] / bottom_N[bottom_N != 0])
    ratio_N = np.concatenate(found)[:n]
    if not len(ratio_N):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(ratio_N, [tail, 1 - tail])
    return float(low), float(high)
