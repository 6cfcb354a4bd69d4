"""Rows of a large graph on the host, a block at a time, and only what can be there.

A graph's matrix is far larger than the caches and half of it is zero: features are
ordered by layer, so that a row has no inputs at or after its own column. Every pass
over it reads the triangle and the columns of the roots once, into a small buffer where
all further work on the block is done, while another thread fills the next buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

__all__ = ["BLOCK", "Edges", "RowBlock", "cut_edges", "row_blocks", "row_strength"]
__all__ += ["submatrix"]

BLOCK = 128  # rows: a block of a graph of 10,000 nodes is 5 MB


class RowBlock(NamedTuple):
    """Some consecutive feature rows; a view that the next but one block overwrites."""

    rows: slice  # of the graph, and the columns of the same features
    below_BX: np.ndarray  # inputs from features, up to the last row's own column
    roots_BM: np.ndarray  # inputs from errors and embeddings


def row_blocks(
    edge_RN: np.ndarray, n_features: int, *, block: int = BLOCK, signed: bool = False
) -> Iterator[RowBlock]:
    """Feature rows from the last to the first.

    Args:
      edge_RN: direct effects; what lies on or above the diagonal of the feature block
        is not to be relied on.
      n_features: A; rows after these are left out.
      block: rows at a time.
      signed: give the edges themselves instead of their absolute values.
    """
    A, N = n_features, edge_RN.shape[1]
    copy = np.positive if signed else np.absolute
    buffers = np.empty((2, min(block, max(A, 1)), N), edge_RN.dtype)
    starts = range(0, A, block)[::-1]

    def load(i: int) -> RowBlock:
        rows = slice(starts[i], min(starts[i] + block, A))
        buffer_BN = buffers[i % 2, : rows.stop - rows.start]
        below_BX, roots_BM = buffer_BN[:, : rows.stop], buffer_BN[:, A:]
        copy(edge_RN[rows, : rows.stop], out=below_BX)
        copy(edge_RN[rows, A:], out=roots_BM)
        return RowBlock(rows, below_BX, roots_BM)

    # numpy lets go of the interpreter while it copies.
    with ThreadPoolExecutor(1) as other:
        ready = other.submit(load, 0) if len(starts) else None
        for i in range(len(starts)):
            assert ready is not None
            found = ready.result()
            if i + 1 < len(starts):
                ready = other.submit(load, i + 1)
            yield found


def row_strength(edge_RN: np.ndarray, n_features: int) -> np.ndarray:
    """Sum of the absolute edges of every row, [R], in the edges' dtype."""
    strength_R = np.empty(len(edge_RN), edge_RN.dtype)
    strength_R[n_features:] = np.abs(edge_RN[n_features:]).sum(1)
    for rows, below_BX, roots_BM in row_blocks(edge_RN, n_features):
        strength_R[rows] = below_BX.sum(1) + roots_BM.sum(1)
    return strength_R


def submatrix(x_RN: np.ndarray, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """``x_RN[np.ix_(row, col)]`` in a third of the time, for many rows and columns."""
    found = np.empty((len(row), len(col)), x_RN.dtype)
    # Some whole rows, then columns of them: an index per entry takes far longer.
    for start in range(0, len(row), BLOCK):
        part = slice(start, start + BLOCK)
        np.take(x_RN[row[part]], col, 1, out=found[part], mode="clip")
    return found


class Edges(NamedTuple):
    """Rows of edges, and of each the sum of what is not among its columns."""

    edge_RN: np.ndarray
    rest_R: np.ndarray
    rest_abs_R: np.ndarray  # summed without sign


def cut_edges(
    edges: Edges, row: np.ndarray, col: np.ndarray, keep_N: np.ndarray
) -> Edges:
    """Some rows and columns; what the rows lose is added to their rests.

    Args:
      edges: of the whole graph.
      row: rows of the smaller one, ascending.
      col: its columns, ascending.
      keep_N: kept columns; others are in the smaller graph at most as empty ones.
    """
    dropped = submatrix(edges.edge_RN, row, np.flatnonzero(~keep_N))
    edge_RN = submatrix(edges.edge_RN, row, col)
    edge_RN[:, ~keep_N[col]] = 0
    rest_R = edges.rest_R[row] + dropped.sum(1)
    return Edges(edge_RN, rest_R, edges.rest_abs_R[row] + np.abs(dropped).sum(1))
