"""Random dictionaries, and the check that arrays and config agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.clt.config import CLTConfig
from jaxclt.errors import InputError
from jaxclt.types import CLTParams

__all__ = ["check", "init"]


def init(
    key: Array,
    cfg: CLTConfig,
    *,
    dtype: jnp.dtype | type = jnp.float32,
    theta: float = 0.03,
    biases: bool = True,
    skip: bool = False,
) -> CLTParams:
    """Random dictionary, uniform as in Circuit Tracing (2025), appendix D.2.

    Args:
      key: PRNG key.
      cfg: dictionary shape.
      dtype: of every leaf.
      theta: initial JumpReLU threshold (absent for other activations).
      biases: small random encoder and decoder biases instead of zeros.
      skip: add a small random linear path.
    """
    L, F, D = cfg.n_layers, cfg.n_features, cfg.d_model
    k_enc, k_dec, k_b, k_c, k_skip = jax.random.split(key, 5)

    def uniform(k: Array, shape: tuple[int, ...], bound: float) -> Array:
        return jax.random.uniform(k, shape, dtype, -bound, bound)

    scale = 0.1 if biases else 0.0
    return CLTParams(
        W_enc_LFD=uniform(k_enc, (L, F, D), F**-0.5),
        b_enc_LF=uniform(k_b, (L, F), scale),
        W_dec=tuple(
            uniform(k, (F, cfg.n_writes(layer), D), (L * D) ** -0.5)
            for layer, k in enumerate(jax.random.split(k_dec, L))
        ),
        b_dec_LD=uniform(k_c, (L, D), scale),
        theta_LF=(
            jnp.full((L, F), theta, dtype) if cfg.activation == "jumprelu" else None
        ),
        W_skip_LDD=uniform(k_skip, (L, D, D), 0.1 * D**-0.5) if skip else None,
    )


def check(params: CLTParams, cfg: CLTConfig) -> None:
    """Raise InputError unless every array has the shape that `cfg` states."""
    L, F, D = cfg.n_layers, cfg.n_features, cfg.d_model
    wanted = {
        "W_enc_LFD": (L, F, D),
        "b_enc_LF": (L, F),
        "b_dec_LD": (L, D),
        "theta_LF": (L, F),
        "W_skip_LDD": (L, D, D),
    }
    for name, shape in wanted.items():
        leaf = getattr(params, name)
        if leaf is not None and leaf.shape != shape:
            raise InputError(
                f"dictionary: {name} has shape {leaf.shape}, its config needs {shape}"
            )
    if len(params.W_dec) != L:
        raise InputError(
            f"dictionary: {len(params.W_dec)} decoder layers, its config needs {L}"
        )
    for layer, W in enumerate(params.W_dec):
        if W.shape != (F, cfg.n_writes(layer), D):
            raise InputError(
                f"dictionary: W_dec[{layer}] has shape {W.shape}, its config needs "
                f"{(F, cfg.n_writes(layer), D)}"
            )
