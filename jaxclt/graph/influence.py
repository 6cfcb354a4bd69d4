"""Influence of every node on the targets: the Neumann series as a linear system.

With the rows of |A| normalised to sum 1, B = (I - Â)^-1 - I sums the strengths of all
paths, and a node's influence is the target-weighted sum of the rows of B that belong to
targets (Circuit Tracing 2025, section 5.2.1; the paper's pseudocode multiplies from the
other side, which is identically zero). Read as a walk that steps from a node to one of
its inputs with probability Â, a node's influence is the probability that the walk
visits it.

Features are ordered by layer, so the system is triangular and one substitution solves
it exactly: no iteration count, no convergence test. `influence` states it for any
transform of JAX; `solve_walk` is the same substitution on a large host graph, block by
block with few compiled shapes, and reads only the triangle.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = [
    "Walk",
    "feature_blocks",
    "influence",
    "influence_series",
    "row_total",
    "solve_influence",
    "solve_walk",
    "total_effect",
]


def row_total(
    edge_RN: Array, bias_R: Array | None = None, rest_abs_R: Array | None = None
) -> Array:
    """What a row's shares are taken of, [R]: the sum of its inputs' absolute values.

    Args:
      edge_RN: direct effects.
      bias_R: bias path, an input of its own (None: left out, as circuit-tracer does).
      rest_abs_R: absolute effects of sources that are not columns (None: left out).
    """
    total_R = jnp.abs(edge_RN).sum(1)
    if bias_R is not None:
        total_R = total_R + jnp.abs(bias_R)
    if rest_abs_R is not None:
        total_R = total_R + rest_abs_R
    return total_R


def influence(edge_RN: Array, total_R: Array, weight_K: Array) -> Array:
    """Influence of every source node on the targets, [N].

    Solves ``y^T (diag(total) - |A_ff|) = b^T`` over the features by back substitution,
    with b the targets' inputs; rows with nothing in them absorb.

    Args:
      edge_RN: direct effects; the feature block is strictly lower triangular.
      total_R: from `row_total`.
      weight_K: weight of each target, usually its probability.
    """
    A = edge_RN.shape[0] - weight_K.shape[0]
    abs_RN = jnp.abs(edge_RN)
    total_R = jnp.where(total_R > 0, total_R, jnp.ones((), total_R.dtype))
    direct_N = (weight_K / total_R[A:]) @ abs_RN[A:]
    system_AA = jnp.diag(total_R[:A]) - abs_RN[:A, :A]
    visits_A = jax.scipy.linalg.solve_triangular(
        system_AA, direct_N[:A], trans=1, lower=True
    )
    return direct_N + visits_A @ abs_RN[:A]


def influence_series(
    edge_RN: Array, total_R: Array, weight_K: Array, *, n_layers: int
) -> Array:
    """The same sum term by term, [n_layers + 1, N]: term k holds paths of k + 1 edges.

    Exactly n_layers + 1 steps: the longest path is embedding, one feature per layer,
    target (spec 3.5). Path lengths are read off the terms.
    """
    A = edge_RN.shape[0] - weight_K.shape[0]
    total_R = jnp.where(total_R > 0, total_R, jnp.ones((), total_R.dtype))
    share_RN = jnp.abs(edge_RN) / total_R[:, None]

    def step(visit_N: Array, _: None) -> tuple[Array, Array]:
        return visit_N[:A] @ share_RN[:A], visit_N

    _, term_LN = jax.lax.scan(step, weight_K @ share_RN[A:], None, n_layers + 1)
    return term_LN


def total_effect(edge_RN: Array, value_A: Array, n_targets: int) -> Array:
    """Signed total effect of every feature on every target, [K, A].

    The derivative of the target with respect to a factor on the feature's activation in
    the local replacement model, all paths included, no gate flipping (spec 3.5):
    ``T = U_kf (I - U_ff)^-1 diag(value)`` with ``U = A / value`` per source column.

    Args:
      edge_RN: direct effects.
      value_A: activations.
      n_targets: K.
    """
    A = edge_RN.shape[0] - n_targets
    safe_A = jnp.where(value_A == 0, jnp.ones((), value_A.dtype), value_A)
    unit_RA = edge_RN[:, :A] / safe_A[None, :]
    eye_AA = jnp.eye(A, dtype=edge_RN.dtype)
    effect_AK = jax.scipy.linalg.solve_triangular(
        eye_AA - unit_RA[:A], unit_RA[A:].T, trans=1, lower=True
    )
    return effect_AK.T * value_A[None, :]


class Walk(NamedTuple):
    """Where the walk of the module's docstring goes, per source node."""

    visit_N: np.ndarray  # probability of a visit, weighted by the targets: influence
    length_N: np.ndarray  # the same times the number of steps until the visit


def solve_walk(
    edge_RN: np.ndarray,
    total_R: np.ndarray,
    weight_K: np.ndarray,
    *,
    block: int = 512,
) -> Walk:
    """Influence, and path lengths with it, of a graph on the host.

    Args:
      edge_RN: direct effects.
      total_R: from `row_total`.
      weight_K: weight of each target.
      block: features substituted at a time.
    """
    K = len(weight_K)
    A = edge_RN.shape[0] - K
    dtype = edge_RN.dtype
    total_R = np.where(total_R > 0, total_R, 1).astype(dtype)
    direct_N = (weight_K / total_R[A:]).astype(dtype) @ np.abs(edge_RN[A:])
    n_padded = -(-A // block) * block
    walk_2A = np.zeros((2, n_padded), dtype)
    walk_2A[:, :A] = direct_N[:A]  # a path of one step has length one
    step_2A = np.zeros_like(walk_2A)
    total_A = np.ones(n_padded, dtype)
    total_A[:A] = total_R[:A]
    for start, rows in feature_blocks(edge_RN, A, block):
        own = slice(start, start + block)
        step, passed = _substitute(rows, total_A[own], walk_2A[:, own], start)
        step_2A[:, own] = step
        walk_2A[:, : rows.shape[1]] += np.asarray(passed)
    rest_AM = np.abs(edge_RN[:A, A:])
    rest_2M = direct_N[None, A:] + step_2A[:, :A] @ rest_AM
    found_2N = np.concatenate([walk_2A[:, :A], rest_2M], axis=1)
    return Walk(found_2N[0], found_2N[1])


def feature_blocks(
    edge_RN: np.ndarray, n_features: int, block: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of the feature block from the last to the first, as (first row, rows).

    Every block is [block, width], zero where the graph ends: the triangle alone is
    read, in few widths, so that few shapes are compiled.
    """
    n_blocks = -(-n_features // block)
    for i in reversed(range(n_blocks)):
        lo, hi = i * block, min((i + 1) * block, n_features)
        width = min(-(-(i + 1) // 4) * 4, n_blocks) * block
        rows = np.zeros((block, width), edge_RN.dtype)
        rows[: hi - lo, :hi] = edge_RN[lo:hi, :hi]
        yield lo, rows


@jax.jit
def _substitute(
    edge_BX: Array, total_B: Array, walk_2B: Array, start: Array
) -> tuple[Array, Array]:
    """Steps [2, B] out of one block of features, and what they add everywhere [2, X].

    The first row of a walk counts visits, the second visits times length so far.
    """
    B = edge_BX.shape[0]
    abs_BX = jnp.abs(edge_BX)
    own_BB = jax.lax.dynamic_slice(abs_BX, (0, start), (B, B))
    solve = partial(
        jax.scipy.linalg.solve_triangular,
        jnp.diag(total_B) - own_BB,
        trans=1,
        lower=True,
    )
    visit_B = solve(walk_2B[0])  # visits over totals
    length_B = solve(walk_2B[1] + visit_B @ own_BB)
    step_2B = jnp.stack([visit_B, visit_B + length_B])
    return step_2B, step_2B @ abs_BX


def solve_influence(
    edge_RN: np.ndarray, total_R: np.ndarray, weight_K: np.ndarray
) -> np.ndarray:
    """Influence [N] of a graph on the host, see `solve_walk`."""
    return solve_walk(edge_RN, total_R, weight_K).visit_N
