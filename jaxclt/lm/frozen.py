"""The frozen stream: the local replacement model's linear part, and its bias path.

With attention patterns and norm denominators taken from a recording, every read is
linear in the embeddings and in whatever is written at the MLPs' places (Circuit
Tracing 2025, section 2.3). JAX itself certifies it: `jax.linear_transpose` accepts
`frozen_reads`, and refuses the live model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.lm.run import Policy, run
from jaxclt.lm.step import Skip
from jaxclt.types import Block, Frozen, LMParams, Reads, Sources

__all__ = ["bias_reads", "fold_post_attn", "frozen_attention", "frozen_reads"]
__all__ += ["replay"]


def frozen_attention(
    p: Block, pattern_HTS: Array, scale_T: Array, resid_TD: Array, *, cfg: LMConfig
) -> Array:
    """What one layer's attention adds to the stream, linear in `resid_TD`.

    A norm behind the attention must be folded in, see `fold_post_attn`.
    """
    p = dataclasses.replace(p, v_bias_LGC=None, o_bias_LD=None)
    norm = layers.attn_norm(p)
    normed_TD = layers.normalise(resid_TD, scale_T, norm, biases=False)
    return layers.move(p, pattern_HTS, layers.values(p, normed_TD), cfg=cfg)


def fold_post_attn(
    blocks: Block, pattern_LHTS: Array | None, post_scale_LT: Array | None
) -> tuple[Block, Array | None]:
    """The frozen attention of a model without a norm behind it that adds the same.

    The norm's frozen scale multiplies what arrives at a position, hence the rows of the
    patterns; its gain goes into the output maps.
    """
    if blocks.post_attn_LD is None or post_scale_LT is None:
        return blocks, pattern_LHTS
    gain_L11D = blocks.post_attn_LD[:, None, None, :]
    blocks = dataclasses.replace(
        blocks, o_LHCD=blocks.o_LHCD * gain_L11D, post_attn_LD=None
    )
    if pattern_LHTS is not None:
        pattern_LHTS = pattern_LHTS * post_scale_LT[:, None, :, None]
    return blocks, pattern_LHTS


def replay(
    params: LMParams,
    frozen: Frozen,
    sources: Sources,
    *,
    cfg: LMConfig,
    skip: tuple[Array, Array] | None = None,
) -> Reads:
    """Run the frozen stream from its sources.

    Args:
      params: model weights (the MLPs are not used).
      frozen: patterns and scales of the clean pass.
      sources: embeddings, and everything written at the MLPs' places except the skip.
      cfg: model shape.
      skip: (scale_LT, W_skip_LDD) of a dictionary with a linear path, a norm before it
        folded in: it writes ``(mid * scale) @ W_skip`` from the stream itself.

    Returns:
      The residual stream where encoders read at every layer, and the normed output.
    """

    def given(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: tuple
    ) -> tuple[None, Array]:
        del scale_T, p
        write_TD, layer_skip = x
        if layer_skip is not None:
            write_TD = write_TD + layer_skip.write(mid_TD)
        return carry, write_TD

    whole = None if skip is None else Skip(*skip)
    policy = Policy(given, per_layer=(sources.write_LTD, whole))
    done = run(params, sources.embed_TD, policy, cfg=cfg, frozen=frozen)
    return Reads(mid_LTD=done.taps.mid_TD, out_TD=done.out_TD)


def frozen_reads(
    params: LMParams,
    frozen: Frozen,
    sources: Sources,
    *,
    cfg: LMConfig,
    skip: tuple[Array, Array] | None = None,
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
    skip: tuple[Array, Array] | None = None,
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
    nothing_TD = jnp.zeros(write_bias_LTD.shape[1:], write_bias_LTD.dtype)
    with jax.named_scope("bias_path"):
        sources = Sources(embed_TD=nothing_TD, write_LTD=write_bias_LTD)
        return replay(params, frozen, sources, cfg=cfg, skip=skip)
