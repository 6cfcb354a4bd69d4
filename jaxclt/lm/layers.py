"""The pieces of a decoder block, each a few lines on one prompt (no batch axis).

Scales are reciprocal norm denominators, computed here and applied elsewhere, so that
the same functions serve the live model and the frozen one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm.config import LMConfig
from jaxclt.types import Block

__all__ = [
    "activate_gate",
    "attention_pattern",
    "gate_and_up",
    "keys",
    "mlp",
    "move",
    "normalise",
    "rms_scale",
    "rotate",
    "values",
]


def rms_scale(x_TD: Array, *, eps: float) -> Array:
    """Reciprocal root mean square of each row, [T]."""
    return jax.lax.rsqrt(jnp.mean(x_TD * x_TD, axis=-1) + eps)


def normalise(x_TD: Array, scale_T: Array, gain_D: Array) -> Array:
    """``x · scale · gain``: linear in x once the scale is frozen."""
    return x_TD * scale_T[:, None] * gain_D[None, :]


def rotate(x_THC: Array, *, theta: float, start: Array | int = 0) -> Array:
    """Rotary embedding by halves: channel c turns with channel c + C/2.

    The first row stands at position `start` of the prompt.
    """
    T, _, C = x_THC.shape
    freq_C = theta ** (-jnp.arange(0, C, 2, dtype=x_THC.dtype) / C)
    pos_T = jnp.arange(T, dtype=x_THC.dtype) + jnp.asarray(start, x_THC.dtype)
    angle_TC = pos_T[:, None] * freq_C[None, :]
    cos, sin = jnp.cos(angle_TC)[:, None, :], jnp.sin(angle_TC)[:, None, :]
    left, right = jnp.split(x_THC, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def keys(p: Block, normed_TD: Array, *, cfg: LMConfig, start: Array | int = 0) -> Array:
    """Keys [T, G, C], turned to their positions."""
    k_TGC = jnp.einsum("TD,DGC->TGC", normed_TD, p.k_LDGC)
    if p.k_bias_LGC is not None:
        k_TGC = k_TGC + p.k_bias_LGC[None]
    return rotate(k_TGC, theta=cfg.rope_theta, start=start)


def values(p: Block, normed_TD: Array, *, biases: bool = True) -> Array:
    """Values [T, G, C]."""
    v_TGC = jnp.einsum("TD,DGC->TGC", normed_TD, p.v_LDGC)
    if biases and p.v_bias_LGC is not None:
        v_TGC = v_TGC + p.v_bias_LGC[None]
    return v_TGC


def attention_pattern(
    p: Block,
    normed_TD: Array,
    *,
    cfg: LMConfig,
    key_SGC: Array | None = None,
    start: Array | int = 0,
) -> Array:
    """Causal attention probabilities [H, T, S]; rows sum to 1. `p` is one layer.

    Args:
      p: weights of one layer.
      normed_TD: what attention reads.
      cfg: model shape.
      key_SGC: keys of all positions from 0 on; None: those of the rows.
      start: position of the first row.
    """
    T = normed_TD.shape[0]
    q_THC = jnp.einsum("TD,DHC->THC", normed_TD, p.q_LDHC)
    if p.q_bias_LHC is not None:
        q_THC = q_THC + p.q_bias_LHC[None]
    q_THC = rotate(q_THC, theta=cfg.rope_theta, start=start)
    if key_SGC is None:
        key_SGC = keys(p, normed_TD, cfg=cfg, start=start)
    k_SHC = _per_query_head(key_SGC, cfg)
    score_HTS = jnp.einsum("THC,SHC->HTS", q_THC, k_SHC) * cfg.d_head**-0.5
    pos_T = start + jnp.arange(T, dtype=jnp.int32)
    causal_TS = jnp.arange(len(k_SHC), dtype=jnp.int32)[None] <= pos_T[:, None]
    lowest = jnp.finfo(score_HTS.dtype).min
    return jax.nn.softmax(jnp.where(causal_TS[None], score_HTS, lowest), axis=-1)


def move(
    p: Block,
    pattern_HTS: Array,
    normed_TD: Array,
    *,
    cfg: LMConfig,
    biases: bool,
    value_SGC: Array | None = None,
) -> Array:
    """What attention moves between positions: values through the pattern, [T, D].

    Linear in `normed_TD` given the pattern, affine with `biases`. `value_SGC` are the
    values of all positions; None: those of the rows.
    """
    if value_SGC is None:
        value_SGC = values(p, normed_TD, biases=biases)
    pattern_GJTS = pattern_HTS.reshape(
        cfg.n_kv_heads, cfg.n_queries_per_kv, *pattern_HTS.shape[1:]
    )
    mixed_TGJC = jnp.einsum("GJTS,SGC->TGJC", pattern_GJTS, value_SGC)
    o_GJCD = p.o_LHCD.reshape(
        cfg.n_kv_heads, cfg.n_queries_per_kv, cfg.d_head, cfg.d_model
    )
    out_TD = jnp.einsum("TGJC,GJCD->TD", mixed_TGJC, o_GJCD)
    if biases and p.o_bias_LD is not None:
        out_TD = out_TD + p.o_bias_LD[None]
    return out_TD


def activate_gate(x: Array, *, cfg: LMConfig) -> Array:
    """The MLP's gate nonlinearity."""
    return jax.nn.silu(x) if cfg.act == "silu" else jax.nn.gelu(x, approximate=True)


def gate_and_up(p: Block, normed_TD: Array, *, cfg: LMConfig) -> tuple[Array, Array]:
    """The two factors of a gated MLP's neurons, [T, I] each: act(x W_gate), x W_up."""
    gate_TI = normed_TD @ p.gate_LDI
    up_TI = normed_TD @ p.up_LDI
    if p.gate_bias_LI is not None:
        gate_TI = gate_TI + p.gate_bias_LI[None]
    if p.up_bias_LI is not None:
        up_TI = up_TI + p.up_bias_LI[None]
    return activate_gate(gate_TI, cfg=cfg), up_TI


def mlp(p: Block, normed_TD: Array, *, cfg: LMConfig) -> Array:
    """Gated MLP: ``(act(x W_gate) * x W_up) W_down``, [T, D]. `p` is one layer."""
    gate_TI, up_TI = gate_and_up(p, normed_TD, cfg=cfg)
    out_TD = (gate_TI * up_TI) @ p.down_LID
    if p.down_bias_LD is not None:
        out_TD = out_TD + p.down_bias_LD[None]
    return out_TD


def _per_query_head(x_TGC: Array, cfg: LMConfig) -> Array:
    """Repeat each key/value head for the query heads that share it."""
    return jnp.repeat(x_TGC, cfg.n_queries_per_kv, axis=1)
