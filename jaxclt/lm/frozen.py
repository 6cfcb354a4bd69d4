"""The frozen stream: the local replacement model's linear part, and its bias path.

With attention patterns and norm denominators taken from a recording, every read is
linear in the embeddings and in whatever is written at the MLPs' places (Circuit
Tracing 2025, section 2.3). JAX itself certifies it: `jax.linear_transpose` accepts
`frozen_reads`, and refuses the live model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.block import frozen_pattern
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Policy, Run, run
from jaxclt.lm.step import Skip
from jaxclt.types import Block, Frozen, Held, LMParams, Reads, Sources

__all__ = ["attention_maps", "bias_reads", "bias_streams", "frozen_reads", "replay"]
__all__ += ["scaled_pattern"]


def attention_maps(p: Block) -> tuple[Array, Array]:
    """One layer's value map [G, C, D] and output map [H, C, D], norms' gains folded in.

    With `scaled_pattern` they are all that frozen attention is.
    """
    value_GCD = layers.fold_norm(p.v_LDGC.transpose(1, 2, 0), layers.attn_norm(p))
    if p.post_attn_LD is None:
        return value_GCD, p.o_LHCD
    return value_GCD, p.o_LHCD * p.post_attn_LD[None, None, :]


def scaled_pattern(p: Block, frozen: Held, *, cfg: LMConfig) -> Array:
    """One layer's clean pattern [H, T, S] times its norms' reciprocal denominators.

    That of the norm before attention belongs to the positions attended to, that of a
    norm after it to those that attend. `p` and `frozen` are without the leading L; the
    latter has the pattern, or the clean stream, and the scales.
    """
    pattern_HTS, scale_T = frozen_pattern(p, frozen, cfg=cfg), frozen.attn_scale_LT
    assert pattern_HTS is not None
    assert scale_T is not None
    pattern_HTS = pattern_HTS * scale_T[None, None, :]
    post_T = frozen.post_attn_scale_LT
    return pattern_HTS if post_T is None else pattern_HTS * post_T[None, :, None]


def replay(
    params: LMParams,
    frozen: Frozen,
    sources: Sources,
    *,
    cfg: LMConfig,
    skip: Skip | None = None,
) -> Reads:
    """Run the frozen stream from its sources.

    Args:
      params: model weights (the MLPs are not used).
      frozen: patterns and scales of the clean pass.
      sources: embeddings, and everything written at the MLPs' places except the skip.
      cfg: model shape.
      skip: linear path of the dictionary, a norm before it folded in; it writes
        ``(mid * scale) @ map`` from the stream itself.

    Returns:
      The residual stream where encoders read at every layer, and the normed output.
    """
    return _reads(_replayed(params, frozen, sources, cfg=cfg, skip=skip))


def _reads(done: Run) -> Reads:
    return Reads(mid_LTD=done.taps.mid_TD, out_TD=done.out_TD)


def _replayed(
    params: LMParams,
    frozen: Frozen,
    sources: Sources,
    *,
    cfg: LMConfig,
    skip: Skip | None,
) -> Run:
    def given(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: tuple
    ) -> tuple[None, Array]:
        del scale_T, p
        write_TD, layer_skip = x
        if layer_skip is not None:
            write_TD = write_TD + layer_skip.write(mid_TD)
        return carry, write_TD

    policy = Policy(given, per_layer=(sources.write_LTD, skip))
    return run(params, sources.embed_TD, policy, cfg=cfg, frozen=frozen)


def frozen_reads(
    params: LMParams,
    frozen: Frozen,
    sources: Sources,
    *,
    cfg: LMConfig,
    skip: Skip | None = None,
) -> Reads:
    """`replay` of the model without biases: exactly linear in `sources`."""
    return replay(_without_biases(params), frozen, sources, cfg=cfg, skip=skip)


def _without_biases(params: LMParams) -> LMParams:
    """The model without the biases of attention and of norms."""

    def zero(bias: Array | None) -> Array | None:
        # A norm with a bias is a LayerNorm, and stays one.
        return None if bias is None else jnp.zeros_like(bias)

    blocks = params.blocks
    blocks = dataclasses.replace(
        blocks,
        v_bias_LGC=None,
        o_bias_LD=None,
        norm_attn_bias_LD=zero(blocks.norm_attn_bias_LD),
    )
    norm_out_bias_D = zero(params.norm_out_bias_D)
    return dataclasses.replace(params, blocks=blocks, norm_out_bias_D=norm_out_bias_D)


def bias_reads(
    params: LMParams,
    frozen: Frozen,
    write_bias_LTD: Array,
    *,
    cfg: LMConfig,
    skip: Skip | None = None,
) -> Reads:
    """What every read holds when all sources are zero: all biases, pushed through.

    Args:
      params: model weights.
      frozen: patterns and scales of the clean pass.
      write_bias_LTD: constants at the MLPs' places (decoder biases, and what a skip
        makes of the bias of a norm).
      cfg: model shape.
      skip: as in `replay`.
    """
    return _reads(_bias_run(params, frozen, write_bias_LTD, cfg=cfg, skip=skip))


def bias_streams(
    params: LMParams,
    frozen: Frozen,
    write_bias_LTD: Array,
    *,
    cfg: LMConfig,
    skip: Skip | None = None,
) -> Array:
    """The same where it enters every layer, [L, T, D]; arguments as of `bias_reads`."""
    done = _bias_run(params, frozen, write_bias_LTD, cfg=cfg, skip=skip)
    return done.taps.resid_TD


def _bias_run(
    params: LMParams, frozen: Frozen, write_bias_LTD: Array, **how: Any
) -> Run:
    nothing_TD = jnp.zeros(write_bias_LTD.shape[1:], write_bias_LTD.dtype)
    with jax.named_scope("bias_path"):
        sources = Sources(embed_TD=nothing_TD, write_LTD=write_bias_LTD)
        return _replayed(params, frozen, sources, **how)
