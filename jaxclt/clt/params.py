"""Random dictionaries, and the check that arrays and config agree."""

from __future__ import annotations

import math

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
    if (params.theta_LF is None) == (cfg.gate.switch == "theta"):
        raise InputError(
            f"dictionary: activation {cfg.activation} and "
            f"{'no ' if params.theta_LF is None else ''}thresholds do not go together"
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
