"""The pieces of a decoder block, each a few lines on one prompt (no batch axis).

Scales are reciprocal norm denominators, computed here and applied elsewhere, so that
the same functions serve the live model and the frozen one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm.activations import activate_gate, gate_factor
from jaxclt.lm.config import LMConfig
from jaxclt.lm.rotary import frequencies, rotate
from jaxclt.precision import precise
from jaxclt.types import Added, Block, LMParams

__all__ = [
    "Norm",
    "attention_pattern",
    "attention_scores",
    "attention_weights",
    "attn_norm",
    "fold_norm",
    "gate_and_up",
    "head_scales",
    "key_gain",
    "key_heads",
    "keys",
    "live_reads",
    "mlp",
    "mlp_and_scale",
    "mlp_at",
    "mlp_norm",
    "move",
    "neuron_rows",
    "norm_scale",
    "normalise",
    "out_norm",
    "pattern_of",
    "pattern_weights",
    "queries",
    "query_gain",
    "query_heads",
    "unit",
    "values",
]


class Norm(NamedTuple):
    """The weights of a norm; one with a bias is a LayerNorm, see `Block`.

    One without a gain is no norm: its scale is 1, and answers to nothing.
    """

    gain: Array | None
    bias: Array | None = None

    def of_layer(self, layer: Array | int) -> Norm:
        """One of several, stacked."""
        return Norm(*(None if x is None else x[layer] for x in self))  # pyright: ignore


def attn_norm(p: Block) -> Norm:
    """The norm before attention; of all layers if `p` has all."""
    return Norm(p.norm_attn_LD, p.norm_attn_bias_LD)


def mlp_norm(p: Block) -> Norm:
    """The norm before the MLP; of all layers if `p` has all."""
    return Norm(p.norm_mlp_LD, p.norm_mlp_bias_LD)


def out_norm(params: LMParams) -> Norm:
    """The norm before the unembedding."""
    return Norm(params.norm_out_D, params.norm_out_bias_D)


def centre(x_TD: Array, norm: Norm) -> Array:
    """Rows without their mean if the norm is a LayerNorm; a symmetric map."""
    return x_TD if norm.bias is None else x_TD - x_TD.mean(-1, keepdims=True)


def norm_scale(x_TD: Array, norm: Norm, *, eps: float) -> Array:
    """Reciprocal denominator [T]: root mean square of each row, or its deviation."""
    if norm.gain is None:
        return jnp.ones(x_TD.shape[:-1], x_TD.dtype)
    x_TD = centre(x_TD, norm)
    return jax.lax.rsqrt(jnp.mean(x_TD * x_TD, axis=-1) + eps)


def unit(x_TD: Array, scale_T: Array, norm: Norm) -> Array:
    """What the norm makes of rows without gain and bias: what its denominator answers
    to, see `live_reads`. Nothing where there is no norm.
    """
    if norm.gain is None:
        return jnp.zeros_like(x_TD)
    return centre(x_TD, norm) * scale_T[..., None]


def normalise(x_TD: Array, scale_T: Array, norm: Norm, *, biases: bool = True) -> Array:
    """``x · scale · gain``, linear in x once the scale is frozen.

    Of a LayerNorm, x without its mean, which is linear too, and a bias.
    """
    if norm.gain is None:
        return x_TD
    out_TD = centre(x_TD, norm) * scale_T[:, None] * norm.gain[None, :]
    if biases and norm.bias is not None:
        out_TD = out_TD + norm.bias[None, :]
    return out_TD


def fold_norm(read_XD: Array, norm: Norm) -> Array:
    """What vectors that read after a norm read before it, but for the scale.

    ``fold_norm(v) · x · scale == v · normalise(x)`` without the bias. Numpy arrays too.
    """
    if norm.gain is None:
        return read_XD
    gain_1D = norm.gain.reshape((1,) * (read_XD.ndim - 1) + norm.gain.shape)
    return centre(read_XD * gain_1D, norm)


@precise
def live_reads(read_XD: Array, unit_XD: Array) -> Array:
    """What vectors that read through a norm read if its denominator answers too.

    ``r - u (u · r) / D``, with u what the norm makes of the stream without gain and
    bias (maths 22.2).

    Args:
      read_XD: what they read with the denominator held, times its reciprocal.
      unit_XD: u, of a shape that broadcasts to theirs.
    """
    # Not a product and a sum, of which XLA for CPUs (jaxlib 0.10.2) makes one kernel
    # that is wrong for many vectors.
    share_X = jnp.einsum("...D,...D->...", unit_XD, read_XD) / read_XD.shape[-1]
    return read_XD - unit_XD * share_X[..., None]


def query_gain(p: Block) -> Array | None:
    """Gains of the norm of one layer's queries: [C], or [H, C] where it is over all."""
    return p.q_norm_LC if p.q_norm_LHC is None else p.q_norm_LHC


def key_gain(p: Block) -> Array | None:
    """The same of keys: [C] or [G, C]."""
    return p.k_norm_LC if p.k_norm_LGC is None else p.k_norm_LGC


def _head_scale(x_THC: Array, gain: Array, *, eps: float) -> Array:
    """Reciprocal denominators [T, H] of a norm over each head's channels, or all."""
    if gain.ndim == 1:
        return norm_scale(x_THC, Norm(gain), eps=eps)
    scale_T = norm_scale(x_THC.reshape(len(x_THC), -1), Norm(gain), eps=eps)
    return jnp.broadcast_to(scale_T[:, None], x_THC.shape[:2])


def _rotated(
    p: Block,
    x_THC: Array,
    gain: Array | None,
    scale_TH: Array | None,
    *,
    cfg: LMConfig,
    start: Array | int,
) -> Array:
    """Queries or keys, normalised where the model does so, at their positions."""
    gain_1HC = gain if gain is None else jnp.atleast_2d(gain)[None]
    if gain is not None:
        if scale_TH is None:  # which turning does not change
            scale_TH = _head_scale(x_THC, gain, eps=cfg.norm_eps)
        x_THC = x_THC * scale_TH[..., None]
    if gain_1HC is not None and not cfg.norm_turned:
        x_THC = x_THC * gain_1HC
    x_THC = rotate(x_THC, frequencies(p, cfg, x_THC.dtype), start=start)
    if gain_1HC is not None and cfg.norm_turned:
        x_THC = x_THC * gain_1HC
    return x_THC


def _projected(normed_TD: Array, weight_DHC: Array, bias_HC: Array | None) -> Array:
    """Queries, keys or values as heads project them."""
    x_THC = jnp.einsum("TD,DHC->THC", normed_TD, weight_DHC)
    return x_THC if bias_HC is None else x_THC + bias_HC[None]


def query_heads(p: Block, normed_TD: Array) -> Array:
    """Queries [T, H, C] before a norm of theirs, not rotated."""
    return _projected(normed_TD, p.q_LDHC, p.q_bias_LHC)


def key_heads(p: Block, normed_TD: Array) -> Array:
    """Keys [T, G, C] before a norm of theirs, not rotated."""
    return _projected(normed_TD, p.k_LDGC, p.k_bias_LGC)


def queries(
    p: Block,
    normed_TD: Array,
    *,
    cfg: LMConfig,
    start: Array | int = 0,
    scale_TH: Array | None = None,
) -> Array:
    """Queries [T, H, C], rotated to their positions.

    Args:
      p: weights of one layer.
      normed_TD: what attention reads.
      cfg: model shape.
      start: position of the first row.
      scale_TH: holds the reciprocal denominators of a norm over their channels (see
        `head_scales`), so that queries are linear; None computes them.
    """
    q_THC = query_heads(p, normed_TD)
    return _rotated(p, q_THC, query_gain(p), scale_TH, cfg=cfg, start=start)


def keys(
    p: Block,
    normed_TD: Array,
    *,
    cfg: LMConfig,
    start: Array | int = 0,
    scale_TG: Array | None = None,
) -> Array:
    """Keys [T, G, C], rotated to their positions; arguments as of `queries`."""
    k_TGC = key_heads(p, normed_TD)
    return _rotated(p, k_TGC, key_gain(p), scale_TG, cfg=cfg, start=start)


def head_scales(
    p: Block, normed_TD: Array, *, cfg: LMConfig
) -> tuple[Array | None, Array | None]:
    """Reciprocal denominators of the norms over queries' and keys' channels.

    [T, H] and [T, G]; None where the model has no such norm.
    """

    def scale(heads_THC: Array, gain: Array | None) -> Array | None:
        return None if gain is None else _head_scale(heads_THC, gain, eps=cfg.norm_eps)

    return (
        scale(query_heads(p, normed_TD), query_gain(p)),
        scale(key_heads(p, normed_TD), key_gain(p)),
    )


def values(p: Block, normed_TD: Array) -> Array:
    """Values [T, G, C]."""
    return _projected(normed_TD, p.v_LDGC, p.v_bias_LGC)


def attention_scores(query_THC: Array, key_SGC: Array, *, cfg: LMConfig) -> Array:
    """Scores [H, T, S] of queries and keys, before a soft cap and the mask.

    Keys may be those of groups or, [S, H, C], of query heads.
    """
    key_SHC = key_SGC
    if key_SGC.shape[1] != query_THC.shape[1]:
        key_SHC = jnp.repeat(key_SGC, cfg.n_queries_per_kv, axis=1)
    return jnp.einsum("THC,SHC->HTS", query_THC, key_SHC) * cfg.score_scale


def attention_pattern(
    p: Block,
    normed_TD: Array,
    *,
    cfg: LMConfig,
    key_SGC: Array | None = None,
    start: Array | int = 0,
    added: Added | None = None,
) -> Array:
    """Causal attention probabilities [H, T, S]; rows sum to 1. `p` is one layer.

    Args:
      p: weights of one layer.
      normed_TD: what attention reads.
      cfg: model shape.
      key_SGC: keys of all positions from 0 on; None: those of the rows.
      start: position of the first row.
      added: to queries and keys of the rows, of one layer.
    """
    q_THC = queries(p, normed_TD, cfg=cfg, start=start)
    if key_SGC is None:
        key_SGC = keys(p, normed_TD, cfg=cfg, start=start)
    if added is not None:
        q_THC = q_THC + added.query_LTHC
        key_SHC = jnp.repeat(key_SGC, cfg.n_queries_per_kv, axis=1)
        key_SGC = key_SHC + added.key_LTHC
    score_HTS = attention_scores(q_THC, key_SGC, cfg=cfg)
    return pattern_of(p, score_HTS, cfg=cfg, start=start)


def pattern_of(
    p: Block, score_HTS: Array, *, cfg: LMConfig, start: Array | int = 0
) -> Array:
    """Attention probabilities [H, T, S] of scores, soft-capped and masked here."""
    if cfg.attn_cap is not None:
        score_HTS = cfg.attn_cap * jnp.tanh(score_HTS / cfg.attn_cap)
    _, n_queries, n_keys = score_HTS.shape
    pos_T = start + jnp.arange(n_queries, dtype=jnp.int32)
    seen_TS = _seen(p, pos_T, n_keys, cfg=cfg)
    lowest = jnp.finfo(score_HTS.dtype).min
    return jax.nn.softmax(jnp.where(seen_TS[None], score_HTS, lowest), axis=-1)


def _seen(p: Block, pos_T: Array, n_keys: int, *, cfg: LMConfig) -> Array:
    """Which positions each query may attend to, bool [T, S]."""
    back_TS = pos_T[:, None] - jnp.arange(n_keys, dtype=jnp.int32)[None]
    seen_TS = back_TS >= 0
    if cfg.window is None:
        return seen_TS
    near_TS = back_TS < cfg.window
    return seen_TS & (near_TS if p.local_L is None else near_TS | ~p.local_L)


def move(p: Block, pattern_HTS: Array, value_SGC: Array, *, cfg: LMConfig) -> Array:
    """What attention moves between positions: values through the pattern, [T, D]."""
    pattern_GJTS = pattern_HTS.reshape(
        cfg.n_kv_heads, cfg.n_queries_per_kv, *pattern_HTS.shape[1:]
    )
    mixed_TGJC = jnp.einsum("GJTS,SGC->TGJC", pattern_GJTS, value_SGC)
    o_GJCD = p.o_LHCD.reshape(
        cfg.n_kv_heads, cfg.n_queries_per_kv, cfg.d_head, cfg.d_model
    )
    out_TD = jnp.einsum("TGJC,GJCD->TD", mixed_TGJC, o_GJCD)
    return out_TD if p.o_bias_LD is None else out_TD + p.o_bias_LD[None]


_PATTERN_LEAVES = ("norm_attn_LD", "norm_attn_bias_LD", "local_L", "turning_L")
_PATTERN_LEAVES += ("q_LDHC", "k_LDGC", "q_bias_LHC", "k_bias_LGC")
_PATTERN_LEAVES += ("q_norm_LC", "k_norm_LC", "q_norm_LHC", "k_norm_LGC")
_MOVE_LEAVES = ("v_LDGC", "v_bias_LGC", "o_LHCD", "o_bias_LD", "post_attn_LD")


def pattern_weights(blocks: Block) -> Block:
    """What computes patterns of all layers: every device that works on edges holds it.

    Other leaves are as small as they may be.
    """
    return _only(blocks, _PATTERN_LEAVES)


def attention_weights(blocks: Block) -> Block:
    """What computes patterns, and what heads move; as `pattern_weights`."""
    return _only(blocks, _PATTERN_LEAVES + _MOVE_LEAVES)


def _only(blocks: Block, names: tuple[str, ...]) -> Block:
    unused = {k for k, leaf in vars(blocks).items() if leaf is not None} - set(names)
    none_L = blocks.q_LDHC[:, 0, 0, 0]
    return dataclasses.replace(blocks, **dict.fromkeys(unused, none_L))


def gate_and_up(p: Block, normed_TD: Array, *, cfg: LMConfig) -> tuple[Array, Array]:
    """The two factors of an MLP's neurons, [T, I] each: act(x W_gate) and x W_up.

    A neuron of an MLP without a gate gates itself: ``act(u) = (act(u) / u) u``.
    """
    up_TI = normed_TD @ p.up_LDI
    if p.up_bias_LI is not None:
        up_TI = up_TI + p.up_bias_LI[None]
    if p.gate_LDI is None:
        return gate_factor(up_TI, p, cfg=cfg), up_TI
    gate_TI = normed_TD @ p.gate_LDI
    if p.gate_bias_LI is not None:
        gate_TI = gate_TI + p.gate_bias_LI[None]
    return activate_gate(gate_TI, p, cfg=cfg), up_TI


def mlp_and_scale(
    p: Block, normed_TD: Array, *, cfg: LMConfig, scale_T: Array | None = None
) -> tuple[Array, Array | None]:
    """What the MLP adds to the stream [T, D], and the scale of the norm after it.

    ``(act(x W_gate) * x W_up) W_down`` or, without a gate, ``act(x W_up) W_down``, then
    that norm, if the model has one.

    Args:
      p: weights of one layer.
      normed_TD: what the MLP reads.
      cfg: model shape.
      scale_T: holds the norm's reciprocal denominator; None computes it.
    """
    gate_TI, up_TI = gate_and_up(p, normed_TD, cfg=cfg)
    out_TD = (gate_TI * up_TI) @ p.down_LID
    if p.down_bias_LD is not None:
        out_TD = out_TD + p.down_bias_LD[None]
    if p.post_mlp_LD is None:
        return out_TD, None
    norm = Norm(p.post_mlp_LD)
    if scale_T is None:
        scale_T = norm_scale(out_TD, norm, eps=cfg.norm_eps)
    return normalise(out_TD, scale_T, norm), scale_T


def mlp(
    p: Block, normed_TD: Array, *, cfg: LMConfig, scale_T: Array | None = None
) -> Array:
    """`mlp_and_scale` without the scale."""
    return mlp_and_scale(p, normed_TD, cfg=cfg, scale_T=scale_T)[0]


def mlp_at(
    p: Block,
    mid_TD: Array,
    scale_T: Array,
    *,
    cfg: LMConfig,
    post_scale_T: Array | None = None,
) -> tuple[Array, Array | None]:
    """`mlp_and_scale` of the stream itself, its norm's reciprocal denominator held."""
    normed_TD = normalise(mid_TD, scale_T, mlp_norm(p))
    return mlp_and_scale(p, normed_TD, cfg=cfg, scale_T=post_scale_T)


def neuron_rows(p: Block) -> Array:
    """What each neuron writes, [I, D], the gain of a norm after the MLP folded in."""
    return p.down_LID if p.post_mlp_LD is None else p.down_LID * p.post_mlp_LD[None]
