"""Intervals of correlations, shares and means (maths 16.10).

Intervals are 95% percentiles over draws of whole units (features, clusters), not of
pairs: what one feature does to several targets is not independent. A draw in which a
measure is undefined is left out; scipy's own bootstrap has no interval then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxclt.files.json_text import rounded

__all__ = [
    "bootstrap",
    "mean_interval",
    "mean_of",
    "ratio_interval",
    "resampled",
    "wilson",
]

_DRAWN = 1 << 22  # numbers that are drawn at a time
_NONE = float("nan"), float("nan")


def resampled(
    measure: Callable[[np.ndarray], np.ndarray],
    n_units: int,
    key: jax.Array,
    *,
    n: int,
    width: int = 1,
) -> tuple[float, float]:
    """The interval of a measure of independent units that are drawn again.

    Args:
      measure: values of draws of units, [draws, units]; nan ones are left out.
      n_units: units there are, and of a draw.
      key: PRNG key.
      n: draws.
      width: numbers that `measure` holds of a unit; bounds its memory.

    Returns:
      Lower and upper end; nan if no draw has a value.
    """
    shape = (min(n, max(1, _DRAWN // (n_units * width))), n_units)
    keys = (jax.random.fold_in(key, i) for i in range(-(-n // shape[0])))
    draws = (np.asarray(jax.random.randint(k, shape, 0, n_units)) for k in keys)
    value_N = np.concatenate([measure(draw_NC) for draw_NC in draws])[:n]
    if np.isnan(value_N).all():
        return _NONE
    tail = (1 - 0.95) / 2
    low, high = np.nanquantile(value_N, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap(
    measure: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    key: jax.Array,
) -> tuple[float, float]:
    """The interval of a correlation (`pearson` or `spearman`) over 500 draws.

    Units are the first axis of both sides; nan if there are fewer than 3.
    """
    if min(len(x), x.size) < 3:
        return _NONE

    def along(draw_NC: np.ndarray) -> np.ndarray:
        N = len(draw_NC)
        return measure(x[draw_NC].reshape(N, -1), y[draw_NC].reshape(N, -1), 1)

    return resampled(along, len(x), key, n=500, width=x.size // len(x))


def wilson(hits: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, hits out of n; nan if n is 0.

    The shares p with ``(hits/n - p)² <= z² p (1 - p) / n``: unlike the normal interval
    it stays within 0..1 and has a width at 0 and at n hits.
    """
    from scipy.stats import binomtest

    if n < 1:
        return _NONE
    found = binomtest(hits, n).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(x: np.ndarray, key: jax.Array) -> tuple[float, float]:
    """The interval of the mean of independent values, over 2000 draws.

    Values that are nan are dropped; nan if fewer than 2 are left.
    """
    x = np.asarray(x, np.float64).ravel()
    x = x[~np.isnan(x)]
    return ratio_interval(x, np.ones(len(x)), key)


def mean_of(x: np.ndarray, key: jax.Array) -> dict[str, Any]:
    """``mean`` of independent values, its ``interval`` and ``n``, as JSON.

    Values that are not finite are dropped; None where nothing can be said.
    """
    x = np.asarray(x, np.float64).ravel()
    x = x[np.isfinite(x)]
    return {
        "mean": rounded(float(x.mean())) if len(x) else None,
        "interval": [rounded(end) for end in mean_interval(x, key)],
        "n": len(x),
    }


def ratio_interval(
    top_C: np.ndarray, bottom_C: np.ndarray, key: jax.Array
) -> tuple[float, float]:
    """The interval of ``sum(top) / sum(bottom)``, over 2000 draws.

    A weighted mean whose values come in clusters is such a ratio, with the sums of each
    cluster: whole clusters are drawn, since values within one are not independent.
    Draws whose denominator is 0 are dropped.

    Args:
      top_C: a value for each independent unit.
      bottom_C: likewise.
      key: PRNG key.

    Returns:
      Lower and upper end; nan if there are fewer than 2 units or one is nan.
    """
    if len(top_C) < 2 or np.isnan(top_C + bottom_C).any():
        return _NONE

    def ratio(draw_NC: np.ndarray) -> np.ndarray:
        bottom_N = bottom_C[draw_NC].sum(1)
        return top_C[draw_NC].sum(1) / np.where(bottom_N != 0, bottom_N, np.nan)

    return resampled(ratio, len(top_C), key, n=2000)
