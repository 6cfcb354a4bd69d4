"""Which rows to compute next: the features that most influence rests on so far.

Not every active feature's inputs matter. Starting from the targets' rows, the influence
that has arrived at a feature whose row is not computed yet is what computing it would
explain (Circuit Tracing 2025, appendix F, adaptive version).
"""

from __future__ import annotations

import numpy as np

__all__ = ["arrived_influence", "next_features"]


def arrived_influence(
    edge_RN: np.ndarray,
    total_R: np.ndarray,
    feature_R: np.ndarray,
    weight_K: np.ndarray,
    layer_A: np.ndarray,
) -> np.ndarray:
    """Influence that arrives at every active feature through the known rows, [A].

    An underestimate for features above which rows are missing: it grows as rows are
    added, never shrinks (maths 10.2).

    Args:
      edge_RN: known rows, in any order; the first columns are the A active features.
      total_R: what each row's shares are taken of.
      feature_R: the feature each row belongs to, -1 - k for target k.
      weight_K: weights of the targets.
      layer_A: layer of each active feature, ascending.
    """
    A = len(layer_A)
    safe_R = np.where(total_R > 0, total_R, 1)
    target_rows = np.flatnonzero(feature_R < 0)
    weight = weight_K[-1 - feature_R[target_rows]] / safe_R[target_rows]
    visit_A = weight @ np.abs(edge_RN[target_rows, :A])
    feature_rows = np.flatnonzero(feature_R >= 0)
    row_layer = layer_A[feature_R[feature_rows]]
    for layer in np.unique(row_layer)[::-1]:
        rows = feature_rows[row_layer == layer]
        below = int(np.searchsorted(layer_A, layer))
        strength = (visit_A[feature_R[rows]] / safe_R[rows]).astype(edge_RN.dtype)
        visit_A[:below] += strength @ np.abs(edge_RN[rows, :below])
    return visit_A


def next_features(
    visit_A: np.ndarray, open_A: np.ndarray, n: int, *, enough: float = 0.0
) -> tuple[np.ndarray, float]:
    """The open features with the most influence, and all influence on open ones.

    Args:
      visit_A: from `arrived_influence`.
      open_A: bool, features whose rows may still be computed.
      n: how many at most.
      enough: stop at the feature that brings the influence on the others to this or
        less; some of what it settles arrives at others and takes a further round.
    """
    candidates = np.flatnonzero(open_A)
    order = np.argsort(-visit_A[candidates], kind="stable")[:n]
    unexplored = float(visit_A[candidates].sum())
    left = unexplored - np.cumsum(visit_A[candidates[order]], dtype=np.float64)
    needed = int(np.searchsorted(-left, -enough)) + 1 if enough > 0 else n
    return np.sort(candidates[order[:needed]]), unexplored
