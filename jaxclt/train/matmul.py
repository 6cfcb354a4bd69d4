"""The one matrix product of training: low-precision inputs, full-precision sums.

Automatic differentiation of a product of bfloat16 casts multiplies a float32 cotangent
with a bfloat16 matrix, which runs at float32 speed. Here the cotangents are cast too:
the three products of a layer have the same input type and accumulate in the masters'.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["matmul"]


def matmul(x_TK: Array, w_KN: Array, compute: str) -> Array:
    """``x @ w`` with both cast to `compute`; the sum and the result have x's dtype.

    Args:
      x_TK: rows.
      w_KN: weights, any dtype.
      compute: name of the dtype that is multiplied.
    """
    return _matmul(x_TK, w_KN, compute)  # pyright: ignore[reportReturnType]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_TK: Array, w_KN: Array, compute: str) -> Array:
    return _dot(x_TK, w_KN, compute, x_TK.dtype, (1, 0))


def _dot(a: Array, b: Array, compute: str, out: jax.typing.DTypeLike, dims) -> Array:
    contract = (((dims[0],), (dims[1],)), ((), ()))
    # What is asked of float32 would widen halves again: they are multiplied as such.
    half = jnp.dtype(compute).itemsize < 4
    return jax.lax.dot_general(
        a.astype(compute),
        b.astype(compute),
        contract,
        precision=jax.lax.Precision.DEFAULT if half else None,
        preferred_element_type=out,
    )


def _forward(x_TK: Array, w_KN: Array, compute: str):
    return _matmul(x_TK, w_KN, compute), (x_TK, w_KN)


def _backward(compute: str, saved: tuple[Array, Array], g_TN: Array):
    x_TK, w_KN = saved
    g_x = _dot(g_TN, w_KN, compute, x_TK.dtype, (1, 1))
    g_w = _dot(x_TK, g_TN, compute, w_KN.dtype, (0, 0))
    return g_x, g_w


_matmul.defvjp(_forward, _backward)
