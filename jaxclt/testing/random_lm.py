"""Random parameters of a decoder with any parts that the library knows."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm.config import LMConfig
from jaxclt.precision import jit
from jaxclt.types import Block, LMParams

__all__ = ["Parts", "random_lm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a model has besides what its config says, see `Block` and `LMParams`."""

    tied: bool = True  # one matrix for embedding and unembedding
    biases: bool = False  # of every projection
    qk_norm: bool = False
    joint_qk_norm: bool = False  # over the channels of all heads
    pre_norms: bool = True  # before attention and MLPs
    turning: tuple[bool, ...] | None = None
    post_norms: bool = False  # of what attention and MLPs write
    local: tuple[bool, ...] | None = None
    embed_scale: float | None = None
    logit_cap: float | None = None
    layer_norm: bool = False  # with biases, instead of RMSNorms
    gated: bool = True  # MLPs
    positions: bool = False  # learned


def random_lm(
    key: Array,
    cfg: LMConfig,
    parts: Parts | None = None,
    *,
    dtype: jnp.dtype | type = jnp.float32,
) -> LMParams:
    """Random weights: normal with variance 1 / fan-in, gains around 1.

    Args:
      key: PRNG key.
      cfg: model shape.
      parts: which parts it has.
      dtype: of every leaf.
    """
    has = parts or Parts()
    L, D, H, G, C = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    I, V, T = cfg.d_mlp, cfg.d_vocab, cfg.n_ctx
    n_weights = (2 * V + 2 * L * (H + G) * C + 3 * L * I + 6 * L + 1) * D
    n_biases = L * ((H + 2 * G) * C + 2 * (I + D))
    # One long draw, cut into leaves: a sampler per shape would compile per shape, and
    # cut in the same program it is fused into, and compiled again for, each leaf.
    n_more = 2 * L * (C * has.qk_norm + D * has.post_norms)
    n_more += L * (H + G) * C * has.joint_qk_norm
    n_more += (2 * L + 1) * D * has.layer_norm + T * D * has.positions
    flat = jax.random.normal(key, (n_weights + n_biases + n_more,), dtype)
    return _cut(flat, cfg, has)


@partial(jit, static_argnames=("cfg", "has"))
def _cut(flat: Array, cfg: LMConfig, has: Parts) -> LMParams:
    """Weights of a model out of independent normal numbers."""
    L, D, H, G, C = cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    I, V, T, dtype = cfg.d_mlp, cfg.d_vocab, cfg.n_ctx, flat.dtype
    used = 0

    def draw(shape: tuple[int, ...]) -> Array:
        nonlocal used
        used += math.prod(shape)
        return flat[used - math.prod(shape) : used].reshape(shape)

    def normal(*shape: int, fan_in: int) -> Array:
        return draw(shape) * fan_in**-0.5

    def gain(*shape: int) -> Array:
        return 1 + 0.2 * draw(shape)

    def scalar(value: float | None) -> Array | None:
        return None if value is None else jnp.asarray(value, dtype)

    def bias(*shape: int) -> Array | None:
        return 0.3 * draw(shape) if has.biases else None

    blocks = Block(
        norm_attn_LD=gain(L, D) if has.pre_norms else None,
        q_LDHC=normal(L, D, H, C, fan_in=D),
        k_LDGC=normal(L, D, G, C, fan_in=D),
        v_LDGC=normal(L, D, G, C, fan_in=D),
        o_LHCD=normal(L, H, C, D, fan_in=H * C),
        norm_mlp_LD=gain(L, D) if has.pre_norms else None,
        gate_LDI=normal(L, D, I, fan_in=D) if has.gated else None,
        up_LDI=normal(L, D, I, fan_in=D),
        down_LID=normal(L, I, D, fan_in=I),
        q_bias_LHC=bias(L, H, C),
        k_bias_LGC=bias(L, G, C),
        v_bias_LGC=bias(L, G, C),
        o_bias_LD=bias(L, D),
        gate_bias_LI=bias(L, I) if has.gated else None,
        up_bias_LI=bias(L, I),
        down_bias_LD=bias(L, D) if not has.post_norms else None,
    )
    params = LMParams(
        embed_VD=normal(V, D, fan_in=1),
        blocks=blocks,
        norm_out_D=gain(D),
        unembed_DV=None if has.tied else normal(D, V, fan_in=D),
        embed_scale=scalar(has.embed_scale),
        logit_cap=scalar(has.logit_cap),
    )
    blocks = dataclasses.replace(
        blocks,
        q_norm_LC=gain(L, C) if has.qk_norm else None,
        k_norm_LC=gain(L, C) if has.qk_norm else None,
        q_norm_LHC=gain(L, H, C) if has.joint_qk_norm else None,
        k_norm_LGC=gain(L, G, C) if has.joint_qk_norm else None,
        post_attn_LD=gain(L, D) if has.post_norms else None,
        post_mlp_LD=gain(L, D) if has.post_norms else None,
        local_L=None if has.local is None else jnp.asarray(has.local, bool),
        turning_L=None if has.turning is None else jnp.asarray(has.turning, bool),
        norm_attn_bias_LD=0.3 * draw((L, D)) if has.layer_norm else None,
        norm_mlp_bias_LD=0.3 * draw((L, D)) if has.layer_norm else None,
    )
    return dataclasses.replace(
        params,
        blocks=blocks,
        norm_out_bias_D=0.3 * draw((D,)) if has.layer_norm else None,
        position_TD=normal(T, D, fan_in=1) if has.positions else None,
    )
