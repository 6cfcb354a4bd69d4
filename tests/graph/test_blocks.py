"""Passes over a graph in blocks: the same as over all of it at once."""

from __future__ import annotations

import numpy as np
import pytest
from cases import close, random_graph

from jaxclt.graph.blocks import row_blocks, row_strength, submatrix

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("block", [1, 5, 12, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_blocks_cover_every_feature_row_from_the_last(block: int, signed: bool) -> None:
    graph = random_graph(1, counts=(4, 5, 3))
    A, edge_RN = graph.n_features, graph.edge_RN
    found = np.zeros((A, edge_RN.shape[1]))
    starts = []
    for rows, below_BX, roots_BM in row_blocks(edge_RN, A, block=block, signed=signed):
        starts.append(rows.start)
        assert below_BX.shape == (rows.stop - rows.start, rows.stop)
        found[rows, : rows.stop], found[rows, A:] = below_BX, roots_BM
    assert starts == sorted(starts, reverse=True)
    np.testing.assert_array_equal(found, edge_RN[:A] if signed else np.abs(edge_RN[:A]))


def test_blocks_do_not_read_the_upper_triangle() -> None:
    graph = random_graph(2)
    A, edge_RN = graph.n_features, graph.edge_RN.copy()
    edge_RN[:A, :A] += np.triu(np.full((A, A), np.nan), 2)
    blocks = list(row_blocks(edge_RN, A, block=1))
    assert len(blocks) == A
    assert all(np.isfinite(block.below_BX).all() for block in blocks)


def test_no_features_no_blocks() -> None:
    graph = random_graph(3, counts=(0, 0))
    assert list(row_blocks(graph.edge_RN, 0)) == []
    close(row_strength(graph.edge_RN, 0), np.abs(graph.edge_RN).sum(1), 1e-15)


def test_row_strength_is_the_sum_without_sign() -> None:
    graph = random_graph(4, counts=(90, 90, 90))  # more than one block
    want = np.abs(graph.edge_RN).sum(1)
    close(row_strength(graph.edge_RN, graph.n_features), want, 1e-14)
    close(graph.row_strength, want, 1e-14)


def test_submatrix_is_the_outer_index() -> None:
    graph = random_graph(5, counts=(80, 90, 70))
    row = np.flatnonzero(np.sin(np.arange(len(graph.edge_RN))) > -0.2)
    col = np.flatnonzero(np.cos(np.arange(graph.edge_RN.shape[1])) > -0.2)
    assert len(row) > 128
    got = submatrix(graph.edge_RN, row, col)
    np.testing.assert_array_equal(got, graph.edge_RN[np.ix_(row, col)])
    assert submatrix(graph.edge_RN, row[:0], col).shape == (0, len(col))
