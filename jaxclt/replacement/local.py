"""The local replacement model as a function you can run and perturb.

The MLPs are replaced by the transcoder, attention patterns and norm denominators are
those of the clean pass, and the error nodes are added as constants, so that on this
prompt every residual stream and every logit equals the model's (Circuit Tracing 2025,
section 2.3) whatever the dictionary.

Everything the graph says about single edges is a statement about `run_local` with the
activations given; everything it says about paths is one about `run_local` with the
features re-encoded.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.model import decode, encode
from jaxclt.clt.sites import read_diagonal
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import replay
from jaxclt.lm.run import run
from jaxclt.types import Block, CLTParams, Frozen, LMParams, Recording, Sources

__all__ = ["LocalReplacement", "LocalRun", "local_replacement", "run_local"]


@struct.dataclass
class LocalReplacement:
    """A model, a dictionary and one clean pass, frozen together."""

    params: LMParams
    clt: CLTParams
    frozen: Frozen
    embed_TD: Array  # clean sources
    error_LTD: Array
    diagonal_LTD: Array  # read_LTD = mid_LTD * diagonal_LTD
    cfg: LMConfig = struct.field(pytree_node=False)
    clt_cfg: CLTConfig = struct.field(pytree_node=False)


@struct.dataclass
class LocalRun:
    """One pass through the local replacement model."""

    mid_LTD: Array
    pre_LTF: Array
    a_LTF: Array
    out_TD: Array  # normed output; jaxclt.lm.run.unembed gives logits


def local_replacement(
    params: LMParams,
    clt: CLTParams,
    recording: Recording,
    *,
    cfg: LMConfig,
    clt_cfg: CLTConfig,
) -> LocalReplacement:
    """Freeze a recording and take up what the dictionary misses in error nodes."""
    diagonal_LTD = jnp.stack(
        [
            read_diagonal(clt_cfg.read, scale_T, gain_D)
            for scale_T, gain_D in zip(
                recording.frozen.mlp_scale_LT, params.blocks.norm_mlp_LD, strict=True
            )
        ]
    )
    read_LTD = recording.mid_LTD * diagonal_LTD
    a_LTF = encode(clt, read_LTD, cfg=clt_cfg)
    return LocalReplacement(
        params=params,
        clt=clt,
        frozen=recording.frozen,
        embed_TD=recording.embed_TD,
        error_LTD=recording.write_LTD - decode(clt, a_LTF, read_LTD),
        diagonal_LTD=diagonal_LTD,
        cfg=cfg,
        clt_cfg=clt_cfg,
    )


def run_local(
    lrm: LocalReplacement,
    *,
    embed_TD: Array | None = None,
    error_LTD: Array | None = None,
    a_LTF: Array | None = None,
) -> LocalRun:
    """Run the local replacement model from given sources.

    Args:
      lrm: the frozen model.
      embed_TD: embeddings; None for the clean ones.
      error_LTD: error nodes; None for the clean ones.
      a_LTF: activations as free inputs (the direct-effect model, affine in everything);
        None re-encodes them layer by layer, gates live.
    """
    embed_TD = lrm.embed_TD if embed_TD is None else embed_TD
    error_LTD = lrm.error_LTD if error_LTD is None else error_LTD
    clt = lrm.clt
    if a_LTF is None:
        a_LTF = _reencode(lrm, embed_TD, error_LTD)
    skip = None
    if clt.W_skip_LDD is not None:
        skip = (lrm.diagonal_LTD, clt.W_skip_LDD)
    without_skip = CLTParams(clt.W_enc_LFD, clt.b_enc_LF, clt.W_dec, clt.b_dec_LD)
    reads = replay(
        lrm.params,
        lrm.frozen,
        Sources(embed_TD=embed_TD, write_LTD=decode(without_skip, a_LTF) + error_LTD),
        cfg=lrm.cfg,
        skip=skip,
    )
    read_LTD = reads.mid_LTD * lrm.diagonal_LTD
    pre_LTF = jnp.einsum("LTD,LFD->LTF", read_LTD, clt.W_enc_LFD)
    pre_LTF = pre_LTF + clt.b_enc_LF[:, None, :]
    return LocalRun(
        mid_LTD=reads.mid_LTD, pre_LTF=pre_LTF, a_LTF=a_LTF, out_TD=reads.out_TD
    )


def _reencode(lrm: LocalReplacement, embed_TD: Array, error_LTD: Array) -> Array:
    """Activations of a pass in which every layer's features are encoded afresh.

    The scan carries what has been written so far to this and the later layers; decoders
    are padded to one span so that one program serves all layers.
    """
    clt, span = lrm.clt, lrm.clt_cfg.span
    T, D = error_LTD.shape[1:]
    dec_LFMD = jnp.stack(
        [jnp.pad(W, ((0, 0), (0, span - W.shape[1]), (0, 0))) for W in clt.W_dec]
    )
    ahead_MTD = jnp.zeros((span, T, D), embed_TD.dtype)

    def policy(
        carry: Array, mid_TD: Array, scale_T: Array, p: Block, x: tuple
    ) -> tuple[Array, Array]:
        del scale_T, p
        W_FD, b_F, theta_F, dec_FMD, b_dec_D, skip_DD, diagonal_TD, error_TD = x
        read_TD = mid_TD * diagonal_TD
        a_TF = activate(read_TD @ W_FD.T + b_F[None], theta_F, cfg=lrm.clt_cfg)
        carry = carry + jnp.einsum("TF,FMD->MTD", a_TF, dec_FMD)
        write_TD = carry[0] + b_dec_D[None] + error_TD
        if skip_DD is not None:
            write_TD = write_TD + read_TD @ skip_DD
        return jnp.roll(carry, -1, 0).at[-1].set(0), write_TD

    per_layer = (
        clt.W_enc_LFD, clt.b_enc_LF, clt.theta_LF, dec_LFMD, clt.b_dec_LD,
        clt.W_skip_LDD, lrm.diagonal_LTD, error_LTD,
    )  # fmt: skip
    done = run(
        lrm.params,
        embed_TD,
        policy,
        cfg=lrm.cfg,
        carry=ahead_MTD,
        per_layer=per_layer,
        frozen=lrm.frozen,
    )
    return encode(clt, done.taps.mid_TD * lrm.diagonal_LTD, cfg=lrm.clt_cfg)
