"""What a graph predicts about patches: total effects, of groups too, and influence."""

from __future__ import annotations

import numpy as np

from jaxclt.graph.graph import Graph
from jaxclt.graph.group_effects import group_effects, solve_rows
from jaxclt.graph.shares import shares_total

__all__ = ["direct_effect", "group_effects", "pairwise_influence"]


def pairwise_influence(graph: Graph, node_W: np.ndarray) -> np.ndarray:
    """Influence of every feature on some features, [W, A].

    Circuit Tracing (2025), section G.2: rows of B, each the probability that the walk
    that starts in the feature visits the other.
    """
    A = graph.n_features
    total_R = shares_total(graph).astype(graph.edge_RN.dtype)
    safe_A = np.where(total_R[:A] > 0, total_R[:A], 1).astype(graph.edge_RN.dtype)
    size_AA = np.abs(graph.edge_RN[:A, :A])
    direct_WA = size_AA[node_W] / safe_A[node_W, None]
    return np.asarray(solve_rows(safe_A, size_AA, direct_WA)) * safe_A[None]


def direct_effect(graph: Graph) -> np.ndarray:
    """Absolute direct edges to the targets, weighted by probability, [A]."""
    edge_KA = graph.edge_RN[graph.target_rows, graph.feature_cols]
    return graph.target_prob_K @ np.abs(edge_KA)
