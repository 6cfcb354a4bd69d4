"""Random and abstract parameters of a decoder."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams

__all__ = ["abstract", "init"]


def init(
    key: Array,
    cfg: LMConfig,
    *,
    dtype: jnp.dtype | type = jnp.float32,
    tied: bool = True,
    biases: bool = False,
    qk_norm: bool = False,
    post_norms: bool = False,
    local: tuple[bool, ...] | None = None,
    embed_scale: float | None = None,
    logit_cap: float | None = None,
    layer_norm: bool = False,
    gated: bool = True,
    positions: bool = False,
) -> LMParams:
    """Random weights: normal with variance 1 / fan-in, gains around 1.

    Args:
      key: PRNG key.
      cfg: model shape.
      dtype: of every leaf.
      tied: share embedding and unembedding.
      biases: give every projection a (random, non-zero) bias.
      qk_norm: normalise queries and keys.
      post_norms: normalise what attention and MLPs write.
      local: `Block.local_L`.
      embed_scale: `LMParams.embed_scale`.
      logit_cap: `LMParams.logit_cap`.
      layer_norm: LayerNorms, with biases, instead of RMSNorms.
      gated: give the MLPs a gate.
      positions: learned ones.
    """
    L, D, H, G, C = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    I, V, T = cfg.d_mlp, cfg.d_vocab, cfg.n_ctx
    n_weights = (2 * V + 2 * L * (H + G) * C + 3 * L * I + 6 * L + 1) * D
    n_biases = L * ((H + 2 * G) * C + 2 * (I + D))
    # One long draw, cut into leaves: a sampler per shape would compile per shape.
    n_more = 2 * L * (C * qk_norm + D * post_norms)
    n_more += (2 * L + 1) * D * layer_norm + T * D * positions
    flat = jax.random.normal(key, (n_weights + n_biases + n_more,), dtype)
    used = 0

    def draw(shape: tuple[int, ...]) -> Array:
        nonlocal used
        used += math.prod(shape)
        return flat[used - math.prod(shape) : used].reshape(shape)

    def normal(*shape: int, fan_in: int) -> Array:
        return draw(shape) * fan_in**-0.5

    def gain(*shape: int) -> Array:
        return 1 + 0.2 * draw(shape)

    def bias(*shape: int) -> Array | None:
        return 0.3 * draw(shape) if biases else None

    blocks = Block(
        norm_attn_LD=gain(L, D),
        q_LDHC=normal(L, D, H, C, fan_in=D),
        k_LDGC=normal(L, D, G, C, fan_in=D),
        v_LDGC=normal(L, D, G, C, fan_in=D),
        o_LHCD=normal(L, H, C, D, fan_in=H * C),
        norm_mlp_LD=gain(L, D),
        gate_LDI=normal(L, D, I, fan_in=D) if gated else None,
        up_LDI=normal(L, D, I, fan_in=D),
        down_LID=normal(L, I, D, fan_in=I),
        q_bias_LHC=bias(L, H, C),
        k_bias_LGC=bias(L, G, C),
        v_bias_LGC=bias(L, G, C),
        o_bias_LD=bias(L, D),
        gate_bias_LI=bias(L, I) if gated else None,
        up_bias_LI=bias(L, I),
        down_bias_LD=bias(L, D) if not post_norms else None,
    )
    params = LMParams(
        embed_VD=normal(V, D, fan_in=1),
        blocks=blocks,
        norm_out_D=gain(D),
        unembed_DV=None if tied else normal(D, V, fan_in=D),
        embed_scale=None if embed_scale is None else jnp.asarray(embed_scale, dtype),
        logit_cap=None if logit_cap is None else jnp.asarray(logit_cap, dtype),
    )
    blocks = dataclasses.replace(
        blocks,
        q_norm_LC=gain(L, C) if qk_norm else None,
        k_norm_LC=gain(L, C) if qk_norm else None,
        post_attn_LD=gain(L, D) if post_norms else None,
        post_mlp_LD=gain(L, D) if post_norms else None,
        local_L=None if local is None else jnp.asarray(local, bool),
        norm_attn_bias_LD=0.3 * draw((L, D)) if layer_norm else None,
        norm_mlp_bias_LD=0.3 * draw((L, D)) if layer_norm else None,
    )
    return dataclasses.replace(
        params,
        blocks=blocks,
        norm_out_bias_D=0.3 * draw((D,)) if layer_norm else None,
        position_TD=normal(T, D, fan_in=1) if positions else None,
    )


def abstract(
    cfg: LMConfig, *, dtype: jnp.dtype | type = jnp.float32, tied: bool = True
) -> LMParams:
    """Shapes and dtypes of `init`'s result without allocating anything."""
    return jax.eval_shape(
        lambda key: init(key, cfg, dtype=dtype, tied=tied), jax.random.key(0)
    )
