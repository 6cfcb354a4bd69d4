"""Penalties of one layer's features: pure functions, averaged over tokens.

Units: outputs are scaled to unit mean variance, so the reconstruction term is a sum
over layers of unexplained fractions, and a weight of 1e-3 on a penalty means that one
unit of it is worth 0.1% of one layer's variance.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxclt.clt.estimators import heaviside

__all__ = [
    "jacobian",
    "l0_to_target",
    "l1",
    "preactivation",
    "reconstruction",
    "tanh_sparsity",
]


def reconstruction(error_TD: Array) -> Array:
    """``mean_t |ŷ - y|² / D`` of one layer; with unit variance, its unexplained share.

    Circuit Tracing (2025), section 2.1, up to the factor D.
    """
    return jnp.mean(jnp.square(error_TD))


def tanh_sparsity(a_TF: Array, norm_F: Array, *, c: float) -> Array:
    """``mean_t Σ_f tanh(c · |W_dec,f| · a_f)``.

    Circuit Tracing (2025), section 2.1: about the number of active features. `norm_F`
    is the norm of the concatenation of all decoders of a feature.
    """
    return jnp.mean(jnp.sum(jnp.tanh(c * norm_F[None] * a_TF), axis=-1))


def l1(a_TF: Array, norm_F: Array) -> Array:
    """``mean_t Σ_f |W_dec,f| a_f`` (a is not negative)."""
    return jnp.mean(jnp.sum(norm_F[None] * a_TF, axis=-1))


def l0_to_target(
    pre_TF: Array, theta_F: Array, *, target: float, bandwidth: float
) -> Array:
    """``(mean_t L0 / target - 1)²``, quadratic in the count, STE gradient to θ and h.

    Rajamanoharan et al. (2024), "Jumping Ahead", section 4 and appendix.
    """
    count = jnp.mean(jnp.sum(heaviside(pre_TF, theta_F, bandwidth), axis=-1))
    return jnp.square(count / target - 1)


def preactivation(
    pre_TF: Array, theta_F: Array | None, norm_F: Array, weight_F: Array
) -> Array:
    """``mean_t Σ_f w_f ReLU(θ_f - h_f) |W_dec,f|``: pulls silent features up.

    Circuit Tracing (2025), appendix D.2 (there without the norm); Anthropic's
    January 2025 update. `weight_F` is 1 for all features, or for dead ones only.
    """
    zero = jnp.zeros((), pre_TF.dtype)
    below_TF = (zero if theta_F is None else theta_F[None]) - pre_TF
    return jnp.mean(
        jnp.sum(weight_F[None] * norm_F[None] * jnp.maximum(below_TF, zero), axis=-1)
    )


def jacobian(
    a_TF: Array, W_enc_FD: Array, W_dec_FD: Array, tangent_TD: Array, response_TD: Array
) -> Array:
    """``mean_t |J_CLT(x) v - J_MLP(x) v|² / D`` along one random tangent per token.

    Its expectation over ``v ~ N(0, I)`` is the squared Frobenius distance of the two
    Jacobians (maths 19.5). Of a CLT, the decoders of the same layer only: that is all
    of a PLT, and the only part that reads the MLP's own input.

    Args:
      a_TF: activations; their support is the gate, which has no derivative.
      W_enc_FD: encoder.
      W_dec_FD: decoders into the same layer.
      tangent_TD: v, in normalised units.
      response_TD: what the true MLP answers to v, in normalised units.
    """
    zero = jnp.zeros((), a_TF.dtype)
    moved_TF = jnp.where(a_TF > zero, tangent_TD @ W_enc_FD.T, zero)
    return jnp.mean(jnp.square(moved_TF @ W_dec_FD - response_TD))
