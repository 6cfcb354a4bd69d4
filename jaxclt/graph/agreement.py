"""How far two sets of numbers agree: correlations, signs and slopes (maths 16.10)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

__all__ = ["pearson", "sign_agreement", "slope", "spearman"]


def pearson(x: np.ndarray, y: np.ndarray, axis: int | None = None) -> Any:
    """Linear correlation; nan if a side does not vary or there are under 3 pairs.

    Args:
      x: any shape.
      y: as `x`.
      axis: of the pairs; None takes all of them and gives one number.
    """
    from scipy import stats

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.size < 3:
        return float("nan")
    if axis is None:
        x, y, axis = x.ravel(), y.ravel(), 0
    with warnings.catch_warnings():  # nan says it
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        return stats.pearsonr(x, y, axis=axis)[0]


def spearman(x: np.ndarray, y: np.ndarray, axis: int | None = None) -> Any:
    """Rank correlation, ties sharing their mean rank; see `pearson`."""
    from scipy.stats import rankdata

    return pearson(rankdata(x, axis=axis), rankdata(y, axis=axis), axis)


def sign_agreement(x: np.ndarray, y: np.ndarray) -> float:
    """Share of equal signs among the pairs with the larger half of ``|x|``."""
    if not len(x):
        return math.nan
    large = np.abs(x) >= np.median(np.abs(x))
    return float((np.sign(x) == np.sign(y))[large].mean())


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of y on x: least squares through zero, ``sum(x y) / sum(x x)``."""
    size = float((x * x).sum())
    return float((x * y).sum() / size) if size > 0 else math.nan
