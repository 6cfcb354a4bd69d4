"""Gates as training needs them: their activations, with straight-through estimators.

Pre-activations h, activations a, threshold θ, bandwidth ε, rect(u) = 1 for |u| < 1/2.
All of them give a >= 0, so that each has a threshold form for export.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["batch_topk", "heaviside", "jumprelu", "kth_largest", "relu", "topk"]


def relu(pre_TF: Array, *_: object) -> Array:
    """``max(h, 0)``."""
    return jnp.maximum(pre_TF, jnp.zeros((), pre_TF.dtype))


def jumprelu(
    pre_TF: Array, theta_F: Array, bandwidth: float, ste_to_input: bool = True
) -> Array:
    """``a = h 1[h > θ]`` with a straight-through estimator for the jump.

        dθ = - (θ/ε) rect((h - θ)/ε)
        dh = 1[h > θ]  (+ (θ/ε) rect((h - θ)/ε)  with `ste_to_input`)

    Rajamanoharan et al. (2024), "Jumping Ahead"; gradient to the input as in Circuit
    Tracing (2025), appendix D.2. θ is a parameter itself: of its logarithm, Adam's
    steps would be relative and small thresholds could not leave zero.

    Args:
      pre_TF: pre-activations.
      theta_F: thresholds, in float32 or wider: bfloat16 would round updates away.
      bandwidth: ε, in units of h.
      ste_to_input: whether the estimator's gradient reaches h.
    """
    return _jumprelu(pre_TF, theta_F, bandwidth, ste_to_input)  # pyright: ignore


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _jumprelu(pre_TF: Array, theta_F: Array, bandwidth: float, ste: bool) -> Array:
    return jnp.where(pre_TF > theta_F[None], pre_TF, jnp.zeros((), pre_TF.dtype))


def _jumprelu_forward(pre_TF: Array, theta_F: Array, bandwidth: float, ste: bool):
    return _jumprelu(pre_TF, theta_F, bandwidth, ste), (pre_TF, theta_F)


def _near(pre_TF: Array, theta_F: Array, bandwidth: float) -> Array:
    """rect((h - θ)/ε) / ε, the estimate of the jump's delta function."""
    inside = jnp.abs(pre_TF - theta_F[None]) < bandwidth / 2
    return jnp.where(
        inside,
        jnp.asarray(1 / bandwidth, pre_TF.dtype),
        jnp.zeros((), pre_TF.dtype),
    )


def _jumprelu_backward(bandwidth: float, ste: bool, saved, g_TF: Array):
    pre_TF, theta_F = saved
    jump_TF = g_TF * theta_F[None] * _near(pre_TF, theta_F, bandwidth)
    g_pre = jnp.where(pre_TF > theta_F[None], g_TF, jnp.zeros((), g_TF.dtype))
    return (g_pre + jump_TF if ste else g_pre), -jump_TF.sum(0)


_jumprelu.defvjp(_jumprelu_forward, _jumprelu_backward)


def heaviside(pre_TF: Array, theta_F: Array, bandwidth: float) -> Array:
    """``1[h > θ]`` whose gradient is rect((h - θ)/ε)/ε to h, minus that to θ.

    What counts features for the L0 penalty; Rajamanoharan et al. (2024), section 4.
    """
    return _heaviside(pre_TF, theta_F, bandwidth)  # pyright: ignore


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _heaviside(pre_TF: Array, theta_F: Array, bandwidth: float) -> Array:
    return (pre_TF > theta_F[None]).astype(pre_TF.dtype)


def _heaviside_forward(pre_TF: Array, theta_F: Array, bandwidth: float):
    return _heaviside(pre_TF, theta_F, bandwidth), (pre_TF, theta_F)


def _heaviside_backward(bandwidth: float, saved, g_TF: Array):
    pre_TF, theta_F = saved
    near_TF = g_TF * _near(pre_TF, theta_F, bandwidth)
    return near_TF, -near_TF.sum(0)


_heaviside.defvjp(_heaviside_forward, _heaviside_backward)


def kth_largest(x: Array, k: int) -> Array:
    """The k-th largest along the last axis, which is kept with size 1."""
    values, _ = jax.lax.top_k(jax.lax.stop_gradient(x), k)
    # Slicing the values directly turns XLA's TopK into a full sort on CPU (34 times
    # slower at [6, 512, 2048], k = 16); the barrier keeps it.
    values = jax.lax.optimization_barrier(values)
    return values[..., -1:]


def _keep(pre_TF: Array, threshold: Array) -> Array:
    zero = jnp.zeros((), pre_TF.dtype)
    return jnp.where((pre_TF >= threshold) & (pre_TF > zero), pre_TF, zero)


def topk(pre_TF: Array, k: int) -> Array:
    """Keep the k largest of every token if positive (Gao et al. 2024)."""
    return _keep(pre_TF, kth_largest(pre_TF, k))


def batch_topk(pre_TF: Array, k: int) -> Array:
    """Keep the ``k T`` largest of the whole batch if positive (Bussmann et al. 2024).

    Two stages, exact unless a token alone holds more than 4k of them: the 4k largest of
    each token, then the ``k T`` largest of those.
    """
    T, F = pre_TF.shape
    rows = min(F, 4 * k)
    best_TK, _ = jax.lax.top_k(jax.lax.stop_gradient(pre_TF), rows)
    best_TK = jax.lax.optimization_barrier(best_TK)
    threshold = kth_largest(best_TK.reshape(1, T * rows), k * T)
    return _keep(pre_TF, threshold)
