"""A transcoder written out, the oracle of tests: what it encodes and decodes.

    a[l] = act(read[l] W_enc[l] + b_enc[l])
    y[m] = sum over l <= m < l + span of  a[l] W_dec[l -> m]  + b_dec[m] (+ skip)

Circuit Tracing (2025), section 2.1. One code path: span = L is a CLT, span = 1 a PLT.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxclt.clt.config import CLTConfig
from jaxclt.types import CLTParams


def activate(pre_TF: Array, theta_F: Array | None, *, cfg: CLTConfig) -> Array:
    """Activations [T, F] of one layer."""
    zero = jnp.zeros((), pre_TF.dtype)
    return jnp.where(cfg.gate.is_on(pre_TF, theta_F, cfg.k), pre_TF, zero)


def preactivate(params: CLTParams, read_LTD: Array) -> Array:
    """Pre-activations [L, T, F]."""
    pre_LTF = jnp.einsum("LTD,LFD->LTF", read_LTD, params.W_enc_LFD)
    return pre_LTF + params.b_enc_LF[:, None, :]


def encode(params: CLTParams, read_LTD: Array, *, cfg: CLTConfig) -> Array:
    """Activations [L, T, F] of every layer."""
    pre_LTF = preactivate(params, read_LTD)
    theta_LF = params.theta_LF
    return jnp.stack(
        [
            activate(pre_TF, None if theta_LF is None else theta_LF[layer], cfg=cfg)
            for layer, pre_TF in enumerate(pre_LTF)
        ]
    )


def decode(params: CLTParams, a_LTF: Array, read_LTD: Array | None = None) -> Array:
    """Reconstructed MLP outputs [L, T, D].

    Args:
      params: dictionary.
      a_LTF: activations.
      read_LTD: what the encoders read; needed by a dictionary with a skip.
    """
    write = [
        jnp.broadcast_to(b_D[None], a_LTF.shape[1:2] + b_D.shape)
        for b_D in params.b_dec_LD
    ]
    for source, W_FMD in enumerate(params.W_dec):
        for offset in range(W_FMD.shape[1]):
            write[source + offset] += a_LTF[source] @ W_FMD[:, offset]
    if params.W_skip_LDD is not None:
        if read_LTD is None:
            raise ValueError("decode: a dictionary with W_skip needs read_LTD")
        write = [
            y_TD + x_TD @ W_DD
            for y_TD, x_TD, W_DD in zip(write, read_LTD, params.W_skip_LDD, strict=True)
        ]
    return jnp.stack(write)
