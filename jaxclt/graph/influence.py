"""Influence of every node on the targets: the Neumann series as a linear system.

With the rows of |A| normalised to sum 1, B = (I - Â)^-1 - I sums the strengths of all
paths, and a node's influence is the target-weighted sum of the rows of B that belong to
targets (Circuit Tracing 2025, section 5.2.1; maths 8). It is the probability that a
walk visits the node that steps from a node to one of its inputs with probability Â.

Features are ordered by layer, so the system is triangular and one substitution solves
it exactly: no iteration count, no convergence test. On a large host graph that is a
jitted triangular solve for every block of the diagonal, one compiled shape, one pass
over the triangle.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.graph.blocks import BLOCK, row_blocks
from jaxclt.precision import jit

__all__ = [
    "Walk",
    "influence_series",
    "solve_influence",
    "solve_walk",
]


def influence_series(
    edge_RN: Array, total_R: Array, weight_K: Array, *, n_layers: int
) -> Array:
    """Influence term by term, [n_layers + 1, N]: term k holds paths of k + 1 edges.

    Exactly n_layers + 1 steps: the longest path is embedding, one feature per layer,
    target (maths 8.3). Path lengths are read off the terms.

    Args:
      edge_RN: direct effects; the feature block is strictly lower triangular.
      total_R: what shares of rows are taken of, see `jaxclt.graph.shares`.
      weight_K: weight of each target, usually its probability.
      n_layers: L.
    """
    A = edge_RN.shape[0] - weight_K.shape[0]
    total_R = jnp.where(total_R > 0, total_R, jnp.ones((), total_R.dtype))
    share_RN = jnp.abs(edge_RN) / total_R[:, None]

    def step(visit_N: Array, _: None) -> tuple[Array, Array]:
        return visit_N[:A] @ share_RN[:A], visit_N

    _, term_LN = jax.lax.scan(step, weight_K @ share_RN[A:], None, n_layers + 1)
    return term_LN


class Walk(NamedTuple):
    """Where the walk of the module's docstring goes, per source node."""

    visit_N: np.ndarray  # probability of a visit, weighted by the targets: influence
    length_N: np.ndarray  # the same times the number of steps until the visit


def solve_walk(
    edge_RN: np.ndarray,
    total_R: np.ndarray,
    weight_K: np.ndarray,
    *,
    block: int = BLOCK,
) -> Walk:
    """Influence, and path lengths with it; arguments as for `influence_series`."""
    return Walk(*_solve(edge_RN, total_R, weight_K, 2, block))


def solve_influence(
    edge_RN: np.ndarray, total_R: np.ndarray, weight_K: np.ndarray
) -> np.ndarray:
    """Influence on the targets, [N]: `solve_walk` without the lengths."""
    return _solve(edge_RN, total_R, weight_K, 1, BLOCK)[0]


def _solve(
    edge_RN: np.ndarray,
    total_R: np.ndarray,
    weight_K: np.ndarray,
    n_moments: int,
    block: int,
) -> np.ndarray:
    """Moments [n_moments, N] of the walk: visits, then visits times length.

    The jitted substitution solves one diagonal block; what the block passes on to the
    columns before it is a product of a vector and a matrix that is in cache by then.
    """
    A, dtype = edge_RN.shape[0] - len(weight_K), edge_RN.dtype
    total_R = np.where(total_R > 0, total_R, 1).astype(dtype)
    direct_N = (weight_K / total_R[A:]).astype(dtype) @ np.abs(edge_RN[A:])
    walk_SN = np.tile(direct_N, (n_moments, 1))  # a path of one step has length one
    for rows, below_BX, roots_BM in row_blocks(edge_RN, A, block=block):
        n = rows.stop - rows.start
        # Full blocks always, so that one shape is compiled.
        own_BB = np.zeros((block, block), dtype)
        own_BB[:n, :n] = below_BX[:, rows]
        total_B, walk_SB = np.ones(block, dtype), np.zeros((n_moments, block), dtype)
        total_B[:n], walk_SB[:, :n] = total_R[rows], walk_SN[:, rows]
        step_SB = np.asarray(_substitute(own_BB, total_B, walk_SB))[:, :n]
        for walk_N, step_B in zip(walk_SN, step_SB, strict=True):
            # einsum, since BLAS would start threads for each of these small products.
            walk_N[: rows.stop] += np.einsum("b,bx->x", step_B, below_BX)
            walk_N[A:] += np.einsum("b,bm->m", step_B, roots_BM)
    return walk_SN


@jit
def _substitute(own_BB: Array, total_B: Array, walk_SB: Array) -> Array:
    """Steps [S, B] out of a block of features: moments over totals.

    Args:
      own_BB: absolute edges inside the block.
      total_B: of its rows.
      walk_SB: what has arrived from outside: visits, and visits times length so far.
    """
    solve = partial(
        jax.scipy.linalg.solve_triangular,
        jnp.diag(total_B) - jnp.tril(own_BB, -1),
        trans=1,
        lower=True,
    )
    visit_B = solve(walk_SB[0])
    if len(walk_SB) == 1:
        return visit_B[None]
    length_B = solve(walk_SB[1] + visit_B @ own_BB)
    return jnp.stack([visit_B, visit_B + length_B])
