"""What a graph predicts of patches of several features at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.graph.effects import total_effects
from jaxclt.graph.graph import Graph
from jaxclt.precision import jit

__all__ = ["group_effects", "solve_rows"]


@jit
def solve_rows(diagonal_A: Array, edge_AA: Array, right_WA: Array) -> Array:
    """X with ``X (diag(diagonal) - edge) = right``."""
    system_AA = jnp.diag(diagonal_A) - edge_AA
    return jax.scipy.linalg.solve_triangular(
        system_AA, right_WA.T, trans=1, lower=True
    ).T


def group_effects(
    graph: Graph,
    groups: list[np.ndarray],
    effect_KA: np.ndarray | None = None,
    *,
    amounts: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Signed total effect of changing groups of features together, [groups, K].

    Members are held, so paths that pass through another member do not count: with N =
    (I - U)^-1 and unit effects y, members' unit effects without such paths are
    ``y_g inv(N_gg)``. Ablating the group changes the targets by minus the result.

    Args:
      graph: attributed.
      groups: feature slots of each group.
      effect_KA: from `total_effects`.
      amounts: by how much the activations of each group rise; None: all they are.
    """
    if effect_KA is None:
        effect_KA = total_effects(graph)
    if not groups:
        return np.zeros((0, graph.n_targets))
    A, dtype = graph.n_features, graph.edge_RN.dtype
    value_A = graph.value_A.astype(dtype)
    safe_A = np.where(value_A == 0, 1, value_A).astype(dtype)
    member_W = np.unique(np.concatenate(groups))
    right_WA = np.zeros((len(member_W), A), dtype)
    right_WA[np.arange(len(member_W)), member_W] = safe_A[member_W]
    N_WA = np.asarray(solve_rows(safe_A, graph.edge_RN[:A, :A], right_WA))
    amounts = [value_A[group] for group in groups] if amounts is None else amounts
    found = []
    for group, amount_g in zip(groups, amounts, strict=True):
        row = np.searchsorted(member_W, group)
        N_gg = N_WA[np.ix_(row, group)].astype(np.float64)
        unit_Kg = effect_KA[:, group] / safe_A[group]
        held_Kg = np.linalg.solve(N_gg.T, unit_Kg.T).T
        found.append(held_Kg @ amount_g)
    return np.stack(found)
