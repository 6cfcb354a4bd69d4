"""How edges travelled, as a graph keeps it: host arrays that can be cut with the graph.

`HeadLoads` lists edges by the last head that moved them; its further axes are E (edges)
and J (heads listed for an edge). `jaxclt.graph.heads.head_loadings` makes it. Any
`EdgeTable` is one of a graph's edges, a row for each.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
from scipy.sparse import csr_array

__all__ = ["EdgeTable", "HeadLoads", "add_rows", "only_columns"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeTable:
    """Some edges of a graph, and what is known of each."""

    row_E: np.ndarray  # int32, of the graph
    col_E: np.ndarray  # int32

    def find(self, row_X: np.ndarray, col_X: np.ndarray) -> np.ndarray:
        """Where edges stand in the table, [X]; -1 for those that are not listed."""
        edges = zip(self.row_E.tolist(), self.col_E.tolist(), strict=True)
        at = {edge: i for i, edge in enumerate(edges)}
        wanted = zip(row_X.tolist(), col_X.tolist(), strict=True)
        return np.array([at.get(edge, -1) for edge in wanted], int)

    def restrict(self, row: np.ndarray, col: np.ndarray, keep_N: np.ndarray) -> Self:
        """Edges between kept nodes, numbered as in the smaller graph.

        Args:
          row: rows of the smaller graph, ascending.
          col: its columns, ascending.
          keep_N: kept columns; others are in the smaller graph at most as empty ones.
        """
        stay_E = np.isin(self.row_E, row) & np.isin(self.col_E, col)
        stay_E &= keep_N[self.col_E]
        kept = {name: array_E[stay_E] for name, array_E in vars(self).items()}
        for name, index in (("row_E", row), ("col_E", col)):
            kept[name] = np.searchsorted(index, kept[name]).astype(np.int32)
        return dataclasses.replace(self, **kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadLoads(EdgeTable):
    """Edges by the last head that moved them; ``edge = direct + sum(load) + rest``."""

    direct_E: np.ndarray  # residual-direct, A0
    layer_EJ: np.ndarray  # int16, strongest first
    head_EJ: np.ndarray  # int16
    load_EJ: np.ndarray  # signed, 0 where fewer heads moved anything
    rest_E: np.ndarray  # all other heads

    @property
    def attention(self) -> np.ndarray:
        """The attention-mediated parts, [E]."""
        return self.load_EJ.sum(1) + self.rest_E

    @property
    def edge(self) -> np.ndarray:
        """The whole edges, [E]."""
        return self.direct_E + self.attention

    def listed(self, at: int) -> tuple[tuple[int, int, float], ...]:
        """Heads of one entry: (layer, head, load), strongest first."""
        entry = self.layer_EJ[at], self.head_EJ[at], self.load_EJ[at]
        return tuple(
            (int(layer), int(head), float(load))
            for layer, head, load in zip(*entry, strict=True)
            if load
        )


def add_rows(x_RN: csr_array, rows: dict[int, np.ndarray]) -> csr_array:
    """The matrix with whole rows [N] added to some of its rows."""
    values = np.stack(list(rows.values()))
    index = np.repeat(list(rows), values.shape[1])
    place = np.tile(np.arange(values.shape[1]), len(rows))
    added = csr_array(x_RN + csr_array((values.ravel(), (index, place)), x_RN.shape))
    added.eliminate_zeros()
    return added


def only_columns(x_RN: csr_array, keep_N: np.ndarray) -> csr_array:
    """The same matrix with all other columns empty."""
    kept = csr_array(
        (x_RN.data * keep_N[x_RN.indices], x_RN.indices, x_RN.indptr), x_RN.shape
    )
    kept.eliminate_zeros()
    return kept
