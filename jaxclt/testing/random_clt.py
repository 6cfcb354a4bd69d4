"""Random parameters of a transcoder of any shape."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.clt.config import CLTConfig
from jaxclt.types import CLTParams

__all__ = ["random_clt"]


def random_clt(
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
    shapes = {
        "W_enc_LFD": ((L, F, D), F**-0.5),
        "b_enc_LF": ((L, F), 0.1 if biases else 0.0),
        "b_dec_LD": ((L, D), 0.1 if biases else 0.0),
        "W_skip_LDD": ((L, D, D), 0.1 * D**-0.5 if skip else 0.0),
        "W_dec": (
            (sum(cfg.n_writes(layer) for layer in range(L)), F, D),
            (L * D) ** -0.5,
        ),
    }
    sizes = [math.prod(shape) for shape, _ in shapes.values()]
    # One long draw, cut into leaves: a sampler per shape would compile per shape.
    flat = jax.random.uniform(key, (sum(sizes),), dtype, -1, 1)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    leaf = {
        name: flat[end - size : end].reshape(shape) * bound
        for (name, (shape, bound)), size, end in zip(
            shapes.items(), sizes, ends, strict=True
        )
    }
    first = [sum(cfg.n_writes(i) for i in range(layer)) for layer in range(L)]
    return CLTParams(
        W_enc_LFD=leaf["W_enc_LFD"],
        b_enc_LF=leaf["b_enc_LF"],
        W_dec=tuple(
            leaf["W_dec"][i : i + cfg.n_writes(layer)].transpose(1, 0, 2)
            for layer, i in enumerate(first)
        ),
        b_dec_LD=leaf["b_dec_LD"],
        theta_LF=(
            jnp.full((L, F), theta, dtype) if cfg.gate.switch == "theta" else None
        ),
        W_skip_LDD=leaf["W_skip_LDD"] if skip else None,
    )
