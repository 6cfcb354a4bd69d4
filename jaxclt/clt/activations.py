"""Feature nonlinearities: which pre-activations become activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.clt.config import CLTConfig

__all__ = ["activate", "groupmax", "jumprelu", "relu", "topk"]


def relu(pre: Array) -> Array:
    """``max(h, 0)``."""
    return jnp.maximum(pre, jnp.zeros((), pre.dtype))


def jumprelu(pre: Array, theta: Array) -> Array:
    """``h · 1(h > θ)``, strictly above the threshold (maths 2.2).

    Args:
      pre: pre-activations, any shape.
      theta: thresholds, broadcastable to `pre`.
    """
    return jnp.where(pre > theta, pre, jnp.zeros((), pre.dtype))


def topk(pre_F: Array, k: int) -> Array:
    """Keep the k largest pre-activations along the last axis, with their sign.

    No ReLU follows, as in the published TopK transcoders.
    """
    _, index = jax.lax.top_k(pre_F, k)
    keep = jnp.put_along_axis(
        jnp.zeros(pre_F.shape, bool), index, jnp.ones((), bool), -1, inplace=False
    )
    return jnp.where(keep, pre_F, jnp.zeros((), pre_F.dtype))


def groupmax(pre_F: Array, k: int) -> Array:
    """``max(h, 0)`` of the largest in each of k groups of neighbours, last axis."""
    shape = pre_F.shape
    grouped = relu(pre_F).reshape(*shape[:-1], k, shape[-1] // k)
    best = jnp.argmax(grouped, axis=-1, keepdims=True)
    at = jax.lax.broadcasted_iota(best.dtype, grouped.shape, grouped.ndim - 1)
    kept = jnp.where(at == best, grouped, jnp.zeros((), pre_F.dtype))
    return kept.reshape(shape)


def activate(pre_TF: Array, theta_F: Array | None, *, cfg: CLTConfig) -> Array:
    """Activations [T, F] of one layer from its pre-activations."""
    if cfg.competes:
        assert cfg.k is not None
        if cfg.activation == "groupmax":
            return groupmax(pre_TF, cfg.k)
        kept_TF = topk(pre_TF, cfg.k)
        # a ReLU before or behind: what it takes is never among the largest positive
        return relu(kept_TF) if cfg.activation == "relu_topk" else kept_TF
    if theta_F is None:
        return relu(pre_TF)
    return jumprelu(pre_TF, theta_F[None, :])
