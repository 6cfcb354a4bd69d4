"""Pruning: the few nodes and edges that carry most of the influence.

Circuit Tracing (2025), appendix F: keep the most influential nodes up to a share of the
total, rebuild the shares on what is left, keep the strongest edges likewise. Embedding
and error nodes stay. ``circuit-tracer``'s variant is here too, for comparison.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph, Pruning
from jaxclt.graph.head_table import only_columns
from jaxclt.graph.influence import solve_influence

__all__ = ["kept_by_mass", "kept_rows", "prune", "restrict"]


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
    positive = np.flatnonzero(score > 0)
    if len(positive) == 0:
        return np.zeros(score.shape, bool)
    order = positive[np.argsort(-score[positive], kind="stable")]
    mass = np.cumsum(score[order], dtype=np.float64)
    crossing = min(int(np.searchsorted(mass / mass[-1], threshold)), len(order) - 1)
    if ties:
        return score >= score[order[crossing]]
    keep = np.zeros(score.shape, bool)
    keep[order[: crossing + 1]] = True
    return keep


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
    for name, value in (("node", node_threshold), ("edge", edge_threshold)):
        if not 0 < value <= 1:
            raise InputError(f"--{name}-threshold {value}: give a share in (0, 1]")
    peer = graph.meta.convention == "circuit-tracer"
    keep_N = kept_by_mass(graph.influence_N, node_threshold, ties=peer)
    keep_N[graph.embed_cols] = True
    if not peer:
        keep_N[graph.error_cols] = True
    keep_edge_RN = _kept_edges(graph, keep_N, edge_threshold)
    if peer:
        keep_N, keep_edge_RN = _drop_dead_ends(graph, keep_N, keep_edge_RN)
    return Pruning(
        keep_N=keep_N,
        keep_edge_RN=keep_edge_RN,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
    )


def kept_rows(graph: Graph, keep_N: np.ndarray) -> np.ndarray:
    """Rows [R] of the kept features, and of all targets."""
    return np.concatenate([keep_N[graph.feature_cols], np.ones(graph.n_targets, bool)])


def _kept_edges(graph: Graph, keep_N: np.ndarray, threshold: float) -> np.ndarray:
    """Edges [R, N] of the strongest score, score = share of the row x its influence."""
    row = np.flatnonzero(kept_rows(graph, keep_N))
    col = np.flatnonzero(keep_N)
    edge = graph.edge_RN[np.ix_(row, col)]
    total = np.abs(edge).sum(1)
    if graph.meta.convention == "paper":
        total = total + np.abs(graph.bias_R[row]) + graph.rest_abs_R[row]
    weight_K = graph.target_prob_K
    found = solve_influence(edge, total, weight_K)
    n_features = len(row) - len(weight_K)
    visit = np.concatenate([found[:n_features], weight_K])
    scale = visit / np.where(total > 0, total, 1)
    score = np.abs(edge) * scale[:, None].astype(edge.dtype)
    keep = kept_by_mass(
        score.ravel(), threshold, ties=graph.meta.convention == "circuit-tracer"
    )
    keep_edge_RN = np.zeros(graph.edge_RN.shape, bool)
    keep_edge_RN[np.ix_(row, col)] = keep.reshape(score.shape)
    return keep_edge_RN


def _drop_dead_ends(
    graph: Graph, keep_N: np.ndarray, keep_edge_RN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop features and errors that lead nowhere, and features that come from nowhere.

    circuit-tracer's last step; a fixpoint after at most n_layers + 1 rounds.
    """
    keep_N, keep_edge_RN = keep_N.copy(), keep_edge_RN.copy()
    A = graph.n_features
    droppable = np.ones(len(keep_N), bool)
    droppable[graph.embed_cols] = False
    while True:
        alive = keep_N & (keep_edge_RN.any(0) | ~droppable)
        alive[:A] &= keep_edge_RN[:A].any(1)
        if (alive == keep_N).all():
            return keep_N, keep_edge_RN
        keep_N = alive
        keep_edge_RN[:, ~keep_N] = False
        keep_edge_RN[:A][~keep_N[:A]] = False


def restrict(graph: Graph) -> Graph:
    """The graph of the kept nodes only; what they lose moves to `rest_R`.

    Rows still sum to their readouts. Columns of dropped error nodes stay, empty, so
    that the layout is the same.
    """
    pruning = graph.pruning
    kept = np.flatnonzero(pruning.keep_N[graph.feature_cols])
    row = np.concatenate([kept, np.arange(graph.n_features, len(graph.edge_RN))])
    col = np.concatenate([kept, np.arange(graph.n_features, graph.edge_RN.shape[1])])
    drop_N = ~pruning.keep_N
    dropped = graph.edge_RN[row][:, drop_N]
    edge_RN = graph.edge_RN[np.ix_(row, col)]
    edge_RN[:, drop_N[col]] = 0
    direct_RN, heads = graph.direct_RN, graph.heads
    if direct_RN is not None:
        direct_RN = only_columns(direct_RN[row][:, col], ~drop_N[col])
    if heads is not None:
        heads = heads.restrict(row, col, pruning.keep_N)
    return dataclasses.replace(
        graph,
        layer_A=graph.layer_A[kept],
        pos_A=graph.pos_A[kept],
        feature_A=graph.feature_A[kept],
        value_A=graph.value_A[kept],
        preact_A=graph.preact_A[kept],
        attributed_R=graph.attributed_R[row],
        edge_RN=edge_RN,
        bias_R=graph.bias_R[row],
        rest_R=graph.rest_R[row] + dropped.sum(1),
        rest_abs_R=graph.rest_abs_R[row] + np.abs(dropped).sum(1),
        readout_R=graph.readout_R[row],
        influence_N=graph.influence_N[col],
        pruning=dataclasses.replace(
            pruning,
            keep_N=pruning.keep_N[col],
            keep_edge_RN=pruning.keep_edge_RN[np.ix_(row, col)],
        ),
        direct_RN=direct_RN,
        heads=heads,
    )
