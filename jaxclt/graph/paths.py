"""The strongest paths of a graph, exactly, and a line of text for each.

A path's strength is the product of the row shares along it times its target's weight:
the probability that the walk of `jaxclt.graph.influence` takes just this path, so the
strengths of all paths from the embeddings sum to the embeddings' influence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import find_column, find_row, labelled, node_label, node_name
from jaxclt.graph.shares import shares_total

__all__ = ["Path", "describe_paths", "strongest_paths"]

_FEW = 256  # rows to begin with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """One path from an input to a target (or to a feature)."""

    nodes: tuple[int, ...]  # columns of the graph, input first; target k is N + k
    strength: float  # never negative
    sign: int  # of its part of the signed total effect, 1 or -1
    share: bool = True  # strength is a share of the target, not an effect on it

    @property
    def steps(self) -> int:
        """How many edges."""
        return len(self.nodes) - 1


def strongest_paths(
    graph: Graph,
    *,
    start: int | str | None = None,
    end: int | str | None = None,
    k: int = 10,
    share: bool = True,
    kept: bool = False,
) -> list[Path]:
    """The k strongest paths, strongest first; fewer if there are not as many.

    Exact: the k best paths to every feature, in order, follow from those to the
    features below it.

    Args:
      graph: attributed, with the influence that belongs to its edges.
      start: column where the paths start, or a name (see `jaxclt.graph.nodes`); None:
        any embedding.
      end: row where they end, with weight 1, or a name; None: any target, weighted by
        its probability.
      k: how many.
      share: rank by row shares, as influence does. Otherwise by the size of a path's
        part of the signed total effect (see `jaxclt.graph.effects`): the product of the
        edges over the activations passed through, which the sign is of in either case.
      kept: only through the nodes and edges that `graph.pruning` keeps. Shares stay
        those of the full rows.

    Raises:
      InputError: if `start`, `end` or `k` is out of range, or names no node.
    """
    R, N = graph.edge_RN.shape
    A = graph.n_features
    start = find_column(graph, start) if isinstance(start, str) else start
    end = find_row(graph, end) if isinstance(end, str) else end
    for name, index, size in (("start", start, N), ("end", end, R)):
        if index is not None and not 0 <= index < size:
            raise InputError(f"{name}={index}: the graph has 0..{size - 1}")
    if k < 1:
        raise InputError(f"k={k}: ask for at least one path")
    first = 0 if start is None or start >= A else start + 1
    if end is None:
        row_E, weight_E = np.arange(A, R), np.asarray(graph.target_prob_K, np.float64)
    else:
        row_E, weight_E = np.array([end]), np.ones(1)
        if end < first:
            return []
    last = A if end is None else min(end + 1, A)
    node_E = graph.layout.node_of(row_E)
    row_B = np.arange(first, last)
    bounded = share and end is None and len(row_B) > _FEW
    if bounded:
        row_B = np.sort(row_B[np.argsort(-graph.influence_N[row_B])[:_FEW]])
    while True:
        best = _Best(graph, start, k, share=share, kept=kept)
        for row in [*row_B, *row_E[row_E >= A]]:
            best.extend(int(row))
        strength = (best.strength_MK[node_E] * weight_E[:, None]).ravel()
        if not bounded:
            break
        # A path's strength is no more than the influence of any node on it: what these
        # rows give bounds the rows that can matter, all of which come next.
        reached = _largest(strength, k)
        least = 0.999 * strength[reached[-1]] if len(reached) == k else 0.0
        row_B = np.arange(first, last)
        row_B = row_B[graph.influence_N[row_B] >= least]
        bounded = False
    return [
        Path(
            nodes=nodes,
            strength=float(strength[i]),
            sign=_sign(graph, nodes),
            share=share,
        )
        for i in _largest(strength, k)
        for nodes in [best.path(int(node_E[i // k]), int(i % k))]
    ]


def _largest(x: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest positive entries, largest first."""
    index = np.flatnonzero(x > 0)
    if len(index) > k:
        index = np.sort(index[np.argpartition(-x[index], k - 1)[:k]])
    return index[np.argsort(-x[index], kind="stable")]


class _Best:
    """The k best paths to every node so far, as their last steps."""

    def __init__(
        self, graph: Graph, start: int | None, k: int, *, share: bool, kept: bool
    ) -> None:
        A, M = graph.n_features, graph.layout.n_columns + graph.n_targets
        self.graph, self.k = graph, k
        self.keep_RN = graph.pruning.keep_edge_RN if kept else None
        is_input_N = graph.layout.ends("input")
        start_X = np.flatnonzero(is_input_N) if start is None else np.array([start])
        self.input_X = start_X[start_X >= A]
        self.strength_MK = np.zeros((M, k))
        self.strength_MK[start_X, 0] = 1
        self.source_MK = np.full((M, k), -1)
        self.rank_MK = np.zeros((M, k), int)  # which of the source's paths it prolongs
        self.total_R = shares_total(graph).astype(np.float64) if share else None
        value_A = np.abs(graph.value_A).astype(np.float64)
        value_A[start_X[start_X < A]] = 1  # a path starts with the whole activation
        self.value_A = np.where(value_A > 0, value_A, 1)

    def extend(self, row: int) -> None:
        """Find the paths to a row from those to everything below it.

        Only the k sources with the best first path can matter: each of them alone is
        as good as anything that comes through the others.
        """
        A = self.graph.n_features
        column_S = np.concatenate([np.arange(min(row, A)), self.input_X])
        size_S = np.abs(self.graph.edge_RN[row, column_S]).astype(np.float64)
        if self.keep_RN is not None:
            size_S *= self.keep_RN[row, column_S]
        if self.total_R is not None:
            size_S /= self.total_R[row] if self.total_R[row] > 0 else 1
        else:
            size_S[: min(row, A)] /= self.value_A[:row]
        use = _largest(size_S * self.strength_MK[column_S, 0], self.k)
        through = (size_S[use, None] * self.strength_MK[column_S[use]]).ravel()
        found = _largest(through, self.k)
        node, n = self.graph.layout.node_of(row), len(found)
        self.strength_MK[node, :n] = through[found]
        self.source_MK[node, :n] = column_S[use[found // self.k]]
        self.rank_MK[node, :n] = found % self.k

    def path(self, node: int, rank: int) -> tuple[int, ...]:
        """Nodes of one path, first to last."""
        nodes = [node]
        while (source := int(self.source_MK[node, rank])) >= 0:
            node, rank = source, int(self.rank_MK[node, rank])
            nodes.append(node)
        return tuple(reversed(nodes))


def _sign(graph: Graph, nodes: Sequence[int]) -> int:
    sign = 1
    for source, node in itertools.pairwise(nodes):
        row = graph.layout.row_of(node)
        sign *= -1 if graph.edge_RN[row, source] < 0 else 1
        # What a feature below zero hands on changes against what it reads.
        sign *= 1 if node == nodes[-1] else int(graph.side_R[row])
    return sign


def describe_paths(graph: Graph, paths: Sequence[Path]) -> str:
    """One line per path: strength (percent, or effect), sign, and the nodes.

    Features that the dictionary has a label for carry it in brackets.
    """
    lines = []
    for path in paths:
        strength = (
            f"{100 * path.strength:6.2f}%" if path.share else f"{path.strength:9.3g}"
        )
        names = " -> ".join(
            labelled(node_name(graph, node), node_label(graph, node))
            for node in path.nodes
        )
        lines.append(f"{strength} {'+' if path.sign > 0 else '-'}  {names}")
    return "\n".join(lines)
