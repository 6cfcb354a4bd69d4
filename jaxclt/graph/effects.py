"""Signed total effects: what removing a feature does to the targets, all paths counted.

While gates stay as they are, a target is affine in a factor on one feature's
activation, with the total effect for its slope: what a change of any size does, too
(maths 9.1; ablation subtracts it).

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

from jaxclt.graph.blocks import BLOCK, row_blocks
from jaxclt.graph.graph import Graph
from jaxclt.precision import jit

__all__ = ["solve_total_effect", "total_effects"]


def total_effects(graph: Graph, *, response: bool = False) -> np.ndarray:
    """Signed total effect of every feature on every target, [K, A].

    Of the whole graph, as a restricted one remembers them; see `solve_total_effect`.

    Args:
      graph: attributed.
      response: by response, which the graph must have, instead of by value.
    """
    edges = graph.response if response else graph
    assert edges is not None
    if edges.total_effect_KA is not None:
        return edges.total_effect_KA
    return solve_total_effect(graph, edge_RN=edges.edge_RN)


def solve_total_effect(
    graph: Graph,
    *,
    direct_XA: np.ndarray | None = None,
    edge_RN: np.ndarray | None = None,
    block: int = BLOCK,
) -> np.ndarray:
    """Signed total effect of every feature on every target, [K, A] (or [X, A]).

    Solves ``y (diag(value) - A_ff) = A_kf`` by blocks; the effect is y times value.

    Args:
      graph: attributed.
      direct_XA: rows of something else to take effects on, in the place of targets.
      edge_RN: other edges of the same nodes, such as those by response.
      block: features substituted at a time.
    """
    edge_RN = graph.edge_RN if edge_RN is None else edge_RN
    A, dtype = graph.n_features, edge_RN.dtype
    value_A = graph.value_A.astype(dtype)
    safe_A = np.where(value_A == 0, 1, value_A).astype(dtype)
    given = edge_RN[graph.target_rows, :A] if direct_XA is None else direct_XA
    direct_KA = np.array(given, dtype)
    unit_KA = np.empty_like(direct_KA)  # effect over value
    for rows, below_BX, _ in row_blocks(edge_RN, A, block=block, signed=True):
        n = rows.stop - rows.start
        # Full blocks always, so that one shape is compiled.
        own_BB, value_B = np.zeros((block, block), dtype), np.ones(block, dtype)
        direct_KB = np.zeros((len(direct_KA), block), dtype)
        own_BB[:n, :n], value_B[:n] = below_BX[:, rows], safe_A[rows]
        direct_KB[:, :n] = direct_KA[:, rows]
        unit_KA[:, rows] = np.asarray(_substitute(own_BB, value_B, direct_KB))[:, :n]
        direct_KA[:, : rows.stop] += unit_KA[:, rows] @ below_BX
    return unit_KA * value_A[None, :]


@jit
def _substitute(own_BB: Array, value_B: Array, direct_KB: Array) -> Array:
    """Effects over values [K, B] of a block, from its edges and what reached it."""
    system_BB = jnp.diag(value_B) - jnp.tril(own_BB, -1)
    solve = partial(jax.scipy.linalg.solve_triangular, trans=1, lower=True)
    return solve(system_BB, direct_KB.T).T
