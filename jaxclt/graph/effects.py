"""Signed total effects: what removing a feature does to the targets, all paths counted.

In the local replacement model every path is a product of linear weights while gates
stay as they are, and no path passes a feature twice. A target is therefore affine in a
factor M on one feature's activation, with slope the total effect: the derivative at
M = 1, and also exactly what a change of any size does (ablation, M = 0, subtracts it).

Gates: that is the model with every other feature's gate frozen. A feature that the
change would switch on or off (a JumpReLU crossing its threshold, a different top-k) is
not accounted for; `jaxclt.graph.inhibition` lists the first kind of such features.
Paths through features that are not nodes of the graph are missing too.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.graph.graph import Graph
from jaxclt.graph.influence import feature_blocks

__all__ = ["solve_total_effect"]


def solve_total_effect(graph: Graph, *, block: int = 512) -> np.ndarray:
    """Signed total effect of every feature on every target, [K, A].

    `jaxclt.graph.influence.total_effect` for a large graph on the host: solves
    ``y (diag(value) - A_ff) = A_kf`` block by block, then the effect is y times value.

    Args:
      graph: attributed.
      block: features substituted at a time.
    """
    A, dtype = graph.n_features, graph.edge_RN.dtype
    n_padded = -(-A // block) * block
    value_A = graph.value_A.astype(dtype)
    safe_A = np.ones(n_padded, dtype)
    safe_A[:A] = np.where(value_A == 0, 1, value_A)
    direct_KA = np.zeros((graph.n_targets, n_padded), dtype)
    direct_KA[:, :A] = graph.edge_RN[graph.target_rows, :A]
    unit_KA = np.zeros_like(direct_KA)  # effect over value
    for start, rows in feature_blocks(graph.edge_RN, A, block):
        own = slice(start, start + block)
        unit, passed = _substitute(rows, safe_A[own], direct_KA[:, own], start)
        unit_KA[:, own] = unit
        direct_KA[:, : rows.shape[1]] += np.asarray(passed)
    return unit_KA[:, :A] * value_A[None, :]


@jax.jit
def _substitute(
    edge_BX: Array, value_B: Array, direct_KB: Array, start: Array
) -> tuple[Array, Array]:
    """Effects over values [K, B] of one block of features, and what they pass on."""
    B = edge_BX.shape[0]
    own_BB = jax.lax.dynamic_slice(edge_BX, (0, start), (B, B))
    solve = partial(jax.scipy.linalg.solve_triangular, trans=1, lower=True)
    unit_BK = solve(jnp.diag(value_B) - own_BB, direct_KB.T)
    # Terms cancel here, so the matmul must not round them to less than they have.
    return unit_BK.T, jnp.matmul(unit_BK.T, edge_BX, precision="highest")
