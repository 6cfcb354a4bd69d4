"""Scores as sums over pairs of nodes, from their factors: numpy on the host.

The matrix of all pairs is never made. Its row and column sums are products with the
factors' own sums, and its largest entries are found by blocks of nodes in the order of
their factors' lengths: where the product of two lengths is below what has been found
already, so is every pair from there on.
"""

from __future__ import annotations

import numpy as np

__all__ = ["strongest_pairs"]

_BLOCK = 512  # nodes of one side at a time


def strongest_pairs(
    query_NC: np.ndarray, key_NC: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """The n pairs of the largest products, without sign, strongest first.

    Args:
      query_NC: factors of one side.
      key_NC: factors of the other.
      n: how many; fewer where fewer are not zero.

    Returns:
      Nodes of the first side, and of the second.
    """
    query, query_size = _by_length(query_NC)
    key, key_size = _by_length(key_NC)
    found = np.zeros(0), np.zeros(0, int), np.zeros(0, int)
    least = 0.0  # of those found, once there are n
    for i in range(0, len(query), _BLOCK):
        rows_BC = query_NC[query[i : i + _BLOCK]]
        for j in range(0, len(key), _BLOCK):
            if query_size[i] * key_size[j] <= least:
                break
            pair_BB = rows_BC @ key_NC[key[j : j + _BLOCK]].T
            row, col = np.divmod(_largest(np.abs(pair_BB), n), pair_BB.shape[1])
            parts = np.abs(pair_BB[row, col]), query[i + row], key[j + col]
            found = tuple(map(np.append, found, parts))
            best = np.argsort(-found[0], kind="stable")[:n]
            found = tuple(part[best] for part in found)
            if len(best) == n:
                least = float(found[0][-1])
    real = found[0] > 0
    return found[1][real], found[2][real]


def _largest(size_BB: np.ndarray, n: int) -> np.ndarray:
    """Places of the n largest, in no order."""
    flat = size_BB.ravel()
    if n >= len(flat):
        return np.arange(len(flat))
    return np.argpartition(-flat, n)[:n]


def _by_length(x_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes whose factors are not zero, longest first, and their lengths."""
    size_N = np.linalg.norm(x_NC.astype(np.float64), axis=1)
    order = np.argsort(-size_N, kind="stable")
    order = order[size_N[order] > 0]
    # Rounding of a product must not put it above the bound.
    return order, size_N[order] * (1 + 1e-5)
