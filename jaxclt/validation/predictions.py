"""What a graph predicts about patches: total effects, of groups too, and influence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.graph.shares import shares_total

__all__ = ["direct_effect", "group_effects", "pairwise_influence"]


@jax.jit
def _solve(diagonal_A: Array, edge_AA: Array, right_WA: Array) -> Array:
    """X with ``X (diag(diagonal) - edge) = right``."""
    system_AA = jnp.diag(diagonal_A) - edge_AA
    return jax.scipy.linalg.solve_triangular(
        system_AA, right_WA.T, trans=1, lower=True
    ).T


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
    return np.asarray(_solve(safe_A, size_AA, direct_WA)) * safe_A[None]


def direct_effect(graph: Graph) -> np.ndarray:
    """Absolute direct edges to the targets, weighted by probability, [A]."""
    edge_KA = graph.edge_RN[graph.target_rows, graph.feature_cols]
    return graph.target_prob_K @ np.abs(edge_KA)


def group_effects(
    graph: Graph, groups: list[np.ndarray], effect_KA: np.ndarray | None = None
) -> np.ndarray:
    """Signed total effect of changing groups of features together, [groups, K].

    Members are held, so paths that pass through another member do not count: with N =
    (I - U)^-1 and unit effects y, members' unit effects without such paths are
    ``y_g inv(N_gg)``. Ablating the group changes the targets by minus the result.

    Args:
      graph: attributed.
      groups: feature slots of each group.
      effect_KA: from `solve_total_effect`.
    """
    if effect_KA is None:
        effect_KA = solve_total_effect(graph)
    if not groups:
        return np.zeros((0, graph.n_targets))
    A, dtype = graph.n_features, graph.edge_RN.dtype
    value_A = graph.value_A.astype(dtype)
    safe_A = np.where(value_A == 0, 1, value_A).astype(dtype)
    member_W = np.unique(np.concatenate(groups))
    right_WA = np.zeros((len(member_W), A), dtype)
    right_WA[np.arange(len(member_W)), member_W] = safe_A[member_W]
    N_WA = np.asarray(_solve(safe_A, graph.edge_RN[:A, :A], right_WA))
    found = []
    for group in groups:
        row = np.searchsorted(member_W, group)
        N_gg = N_WA[np.ix_(row, group)].astype(np.float64)
        unit_Kg = effect_KA[:, group] / safe_A[group]
        held_Kg = np.linalg.solve(N_gg.T, unit_Kg.T).T
        found.append(held_Kg @ value_A[group])
    return np.stack(found)
