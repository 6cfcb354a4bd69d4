"""Logits of vectors in the stream, and the largest of many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm.layers import normalise, out_norm
from jaxclt.lm.run import readout
from jaxclt.precision import jit
from jaxclt.types import LMParams

__all__ = ["GROUP", "highest", "normed", "written_logits"]

GROUP = 64  # tokens whose largest is looked at first


def normed(params: LMParams, written_ND: Array) -> Array:
    """Vectors in the stream past the final norm, but for its denominator and bias."""
    one_N = jnp.ones(len(written_ND), written_ND.dtype)
    return normalise(written_ND, one_N, out_norm(params), biases=False)


@jit
def written_logits(params: LMParams, written_ND: Array) -> Array:
    """Demeaned logits [N, V] of vectors in the stream, before any cap.

    The final norm's gain is folded in, its denominator is left out: it is positive and
    the same for all tokens.
    """
    logit_NV = readout(params, normed(params, written_ND), bias=False)
    return logit_NV - logit_NV.mean(1, keepdims=True)


def highest(x_RN: Array, k: int, group: int = 8) -> tuple[Array, Array]:
    """Values and columns [R, k] of the largest of each row, of equals the first.

    They lie in the k groups of columns with the largest maxima, so that only those are
    searched, in the order of columns: a maximum is much cheaper than a selection.
    """
    R, N = x_RN.shape
    n_groups = -(-N // group)
    if n_groups <= 2 * k:
        return jax.lax.top_k(x_RN, min(k, N))
    lowest = jnp.asarray(-jnp.inf, x_RN.dtype)
    room = ((0, 0), (0, n_groups * group - N))
    x_RGJ = jnp.pad(x_RN, room, constant_values=lowest).reshape(R, n_groups, group)
    _, group_RK = jax.lax.top_k(x_RGJ.max(2), k)
    group_RK = jnp.sort(group_RK, 1)
    near_RKJ = jnp.take_along_axis(x_RGJ, group_RK[:, :, None], 1)
    value_RK, at_RK = jax.lax.top_k(near_RKJ.reshape(R, -1), k)
    group_RK = jnp.take_along_axis(group_RK, at_RK // group, 1)
    return value_RK, group_RK * group + at_RK % group
