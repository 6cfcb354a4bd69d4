"""How far two sets of numbers agree: correlations, signs, slopes (maths 22.42)."""

from __future__ import annotations

import math
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
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.size < 3:
        return math.nan
    if axis is None:
        x, y, axis = x.ravel(), y.ravel(), 0
    varies = (x != x.take([0], axis)).any(axis) & (y != y.take([0], axis)).any(axis)
    x, y = (side - side.mean(axis, keepdims=True) for side in (x, y))
    size = np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
    found = (x * y).sum(axis) / np.where(size > 0, size, np.nan)
    return np.where(varies, np.clip(found, -1, 1), np.nan)[()]


def spearman(x: np.ndarray, y: np.ndarray, axis: int | None = None) -> Any:
    """Rank correlation, ties sharing their mean rank; see `pearson`."""
    return pearson(_ranks(x, axis), _ranks(y, axis), axis)


def _ranks(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Places in ascending order along an axis, that of ties their mean."""
    if axis is None:
        x, axis = np.ravel(x), 0
    order = np.argsort(x, axis, kind="stable")
    x = np.moveaxis(np.take_along_axis(x, order, axis), axis, -1)
    edge, place = np.ones_like(x[..., :1], bool), np.arange(x.shape[-1])
    new = x[..., 1:] != x[..., :-1]
    first, last = np.append(edge, new, -1), np.append(new, edge, -1)
    start = np.maximum.accumulate(np.where(first, place, 0), -1)
    ends = np.where(last, place, len(place))[..., ::-1]
    end = np.minimum.accumulate(ends, -1)[..., ::-1]
    rank = np.empty(order.shape)
    np.put_along_axis(rank, order, np.moveaxis((start + end) / 2, -1, axis), axis)
    return rank


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
