"""Pruning: the few nodes and edges that carry most of the influence.

Circuit Tracing (2025), appendix F: keep the most influential nodes up to a share of the
total, rebuild the shares on what is left, keep the strongest edges likewise. Kinds of
nodes that stay whatever their influence say so in `jaxclt.graph.kinds`.
``circuit-tracer``'s variant is here too, for comparison.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.errors import check_share
from jaxclt.graph.blocks import Edges, cut_edges, submatrix
from jaxclt.graph.effects import total_effects
from jaxclt.graph.graph import Graph, Pruning
from jaxclt.graph.head_table import only_columns
from jaxclt.graph.influence import solve_influence

__all__ = ["kept_by_mass", "kept_rows", "prune", "restrict"]

_FEW = 1 << 13  # scores that are simply sorted


def kept_by_mass(score: np.ndarray, threshold: float, *, ties: bool) -> np.ndarray:
    """Keep the largest scores up to `threshold` of their sum, the crossing one too.

    Args:
      score: non-negative scores, flat.
      threshold: share of the sum in (0, 1]; 1 keeps every positive score.
      ties: keep all scores equal to the last one kept (circuit-tracer); otherwise ties
        break by position, so that the result is the shortest prefix.
    """
    if threshold >= 1.0:
        return score > 0
    total = float(score.sum(dtype=np.float64))
    if not total > 0:
        return np.zeros(score.shape, bool)
    last, n_last = _crossing(score, threshold, total)
    if ties:
        return score >= last
    keep = score > last
    keep[np.flatnonzero(score == last)[:n_last]] = True
    return keep


def _crossing(score: np.ndarray, threshold: float, total: float) -> tuple[float, int]:
    """The score that crosses the threshold, and how many of its equals it takes.

    A selection by mass instead of a sort of everything: the scores on one side of a
    pivot are settled by their sum alone.
    """
    left, settled = score, 0.0  # candidates; mass of all scores above them
    while len(left) > _FEW:
        sample = left[:: len(left) // _FEW + 1]
        sample = np.sort(sample[sample > 0])[::-1]
        mass = np.cumsum(sample, dtype=np.float64)
        if len(sample) == 0:
            break
        # Where the sample thinks the crossing is: most go with the first pivot.
        wanted = (threshold * total - settled) / (left.sum(dtype=np.float64) or 1)
        guess = int(np.searchsorted(mass, wanted * mass[-1]))
        pivot = sample[min(guess, len(sample) - 1)]
        upper = left[left >= pivot]
        reached = settled + float(upper.sum(dtype=np.float64))
        if reached / total >= threshold:
            smaller = upper
        else:
            smaller, settled = left[left < pivot], reached
        if len(smaller) == len(left):
            break
        left = smaller
    order = np.sort(left[left > 0])[::-1]
    mass = settled + np.cumsum(order, dtype=np.float64)
    crossing = min(int(np.searchsorted(mass / total, threshold)), len(order) - 1)
    last = order[crossing]
    first = len(order) - int(np.searchsorted(order[::-1], last, side="right"))
    return last, crossing - first + 1


def prune(
    graph: Graph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> Pruning:
    """Which nodes and edges to keep, by the graph's own convention.

    Args:
      graph: with `influence_N` filled in.
      node_threshold: share of the total influence the kept nodes hold.
      edge_threshold: share of the total edge score the kept edges hold.

    Raises:
      InputError: if a threshold lies outside (0, 1].
    """
    check_share(node_threshold=node_threshold, edge_threshold=edge_threshold)
    peer = graph.meta.convention == "circuit-tracer"
    keep_N = kept_by_mass(graph.influence_N, node_threshold, ties=peer)
    keep_N |= graph.layout.kept_by(graph.meta.convention)
    row_E, col_E = _kept_edges(graph, keep_N, edge_threshold)
    if peer:
        keep_N, row_E, col_E = _drop_dead_ends(graph, keep_N, row_E, col_E)
    keep_edge_RN = np.zeros(graph.edge_RN.shape, bool)
    keep_edge_RN[row_E, col_E] = True
    return Pruning(
        keep_N=keep_N,
        keep_edge_RN=keep_edge_RN,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
    )


def kept_rows(graph: Graph, keep_N: np.ndarray) -> np.ndarray:
    """Rows [R] of the kept features, and of all targets."""
    return np.concatenate([keep_N[graph.feature_cols], np.ones(graph.n_targets, bool)])


def _kept_edges(
    graph: Graph, keep_N: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the edges of the strongest score, in order.

    An edge's score is its share of its row times the row's influence, both among the
    kept nodes.
    """
    row = np.flatnonzero(kept_rows(graph, keep_N))
    col = np.flatnonzero(keep_N)
    size = submatrix(graph.edge_RN, row, col)
    np.absolute(size, out=size)
    total = size.sum(1)
    if graph.meta.convention == "paper":
        total = total + np.abs(graph.bias_R[row]) + graph.rest_abs_R[row]
    weight_K = graph.target_prob_K
    found = solve_influence(size, total, weight_K)
    n_features = len(row) - len(weight_K)
    visit = np.concatenate([found[:n_features], weight_K])
    scale = visit / np.where(total > 0, total, 1)
    score = np.multiply(size, scale[:, None].astype(size.dtype), out=size)
    keep = kept_by_mass(
        score.ravel(), threshold, ties=graph.meta.convention == "circuit-tracer"
    )
    row_E, col_E = np.divmod(np.flatnonzero(keep), len(col))
    return row[row_E], col[col_E]


def _drop_dead_ends(
    graph: Graph, keep_N: np.ndarray, row_E: np.ndarray, col_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop features and errors that lead nowhere, and features that come from nowhere.

    circuit-tracer's last step; a fixpoint after at most n_layers + 1 rounds.
    """
    A = graph.n_features
    stays_N = graph.layout.kept_by(graph.meta.convention)
    while True:
        alive_N = keep_N & stays_N
        alive_N[col_E] = keep_N[col_E]
        fed_A = np.zeros(A, bool)
        fed_A[row_E[row_E < A]] = True
        alive_N[:A] &= fed_A
        if (alive_N == keep_N).all():
            return keep_N, row_E, col_E
        keep_N = alive_N
        alive_E = kept_rows(graph, keep_N)[row_E] & keep_N[col_E]
        row_E, col_E = row_E[alive_E], col_E[alive_E]


def restrict(graph: Graph) -> Graph:
    """The graph of the kept nodes only; what they lose moves to `rest_R`.

    Rows still sum to their readouts, and total effects are those of the whole graph.
    Columns of dropped error nodes stay, empty, so that the layout is the same.
    """
    pruning, keep_N = graph.pruning, graph.pruning.keep_N
    stays_N = keep_N | ~graph.layout.ends(None)
    row, col = np.flatnonzero(kept_rows(graph, stays_N)), np.flatnonzero(stays_N)
    edges = Edges(graph.edge_RN, graph.rest_R, graph.rest_abs_R)
    direct_RN, derivative_KN = graph.direct_RN, graph.derivative_KN
    if direct_RN is not None:
        direct_RN = only_columns(direct_RN[row][:, col], keep_N[col])
    if derivative_KN is not None:
        derivative_KN = (derivative_KN * keep_N)[:, col]
    tables = {
        name: table.restrict(row, col, keep_N)
        for name in ("heads", "response")
        if (table := getattr(graph, name)) is not None
    }
    slot_A = row[row < graph.n_features]
    if "response" in tables:
        found_KA = total_effects(graph, response=True)[:, slot_A]
        response = dataclasses.replace(tables["response"], total_effect_KA=found_KA)
        tables["response"] = response
    along = {"A": slot_A, "R": row, "N": col}
    cut = {
        field.name: getattr(graph, field.name)[along[axis]]
        for field in dataclasses.fields(graph)
        for _, _, axis in [field.name.rpartition("_")]
        if axis in along
    }
    cut |= cut_edges(edges, row, col, keep_N)._asdict()
    return dataclasses.replace(
        graph,
        **cut | tables,
        direct_RN=direct_RN,
        derivative_KN=derivative_KN,
        total_effect_KA=total_effects(graph)[:, slot_A],
        pruning=dataclasses.replace(
            pruning,
            keep_N=keep_N[col],
            keep_edge_RN=submatrix(pruning.keep_edge_RN, row, col),
        ),
    )
