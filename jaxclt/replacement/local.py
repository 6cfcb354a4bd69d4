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

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.model import decode, encode, preactivate
from jaxclt.clt.sites import read_site
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.lm.run import run
from jaxclt.types import Block, CLTParams, Frozen, LMParams, Recording

__all__ = ["LocalReplacement", "LocalRun", "local_replacement", "run_local"]


@struct.dataclass
class LocalReplacement:
    """A model, a dictionary and one clean pass, frozen together."""

    params: LMParams
    clt: CLTParams
    frozen: Frozen
    embed_TD: Array  # clean sources
    error_LTD: Array
    cfg: LMConfig = struct.field(pytree_node=False)
    clt_cfg: CLTConfig = struct.field(pytree_node=False)

    def reads(self, mid_LTD: Array) -> Array:
        """What the encoders read of the stream, norm denominators frozen."""
        return _reads(self.clt_cfg, self.params, self.frozen, mid_LTD)


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
    read_LTD = _reads(clt_cfg, params, recording.frozen, recording.mid_LTD)
    a_LTF = encode(clt, read_LTD, cfg=clt_cfg)
    return LocalReplacement(
        params=params,
        clt=clt,
        frozen=recording.frozen,
        embed_TD=recording.embed_TD,
        error_LTD=recording.write_LTD - decode(clt, a_LTF, read_LTD),
        cfg=cfg,
        clt_cfg=clt_cfg,
    )


def _reads(
    clt_cfg: CLTConfig, params: LMParams, frozen: Frozen, mid_LTD: Array
) -> Array:
    read = jax.vmap(partial(read_site, clt_cfg.read))
    return read(mlp_norm(params.blocks), mid_LTD, frozen.mlp_scale_LT)


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
    without_skip = CLTParams(clt.W_enc_LFD, clt.b_enc_LF, clt.W_dec, clt.b_dec_LD)

    def given(
        carry: None, mid_TD: Array, scale_T: Array, p: Block, x: tuple
    ) -> tuple[None, Array]:
        write_TD, skip_DD = x
        if skip_DD is not None:
            read_TD = read_site(lrm.clt_cfg.read, mlp_norm(p), mid_TD, scale_T)
            write_TD = write_TD + read_TD @ skip_DD
        return carry, write_TD

    done = run(
        lrm.params,
        embed_TD,
        given,
        cfg=lrm.cfg,
        per_layer=(decode(without_skip, a_LTF) + error_LTD, clt.W_skip_LDD),
        frozen=lrm.frozen,
    )
    mid_LTD = done.taps.mid_TD
    return LocalRun(
        mid_LTD=mid_LTD,
        pre_LTF=preactivate(clt, lrm.reads(mid_LTD)),
        a_LTF=a_LTF,
        out_TD=done.out_TD,
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
        W_FD, b_F, theta_F, dec_FMD, b_dec_D, skip_DD, error_TD = x
        read_TD = read_site(lrm.clt_cfg.read, mlp_norm(p), mid_TD, scale_T)
        a_TF = activate(read_TD @ W_FD.T + b_F[None], theta_F, cfg=lrm.clt_cfg)
        carry = carry + jnp.einsum("TF,FMD->MTD", a_TF, dec_FMD)
        write_TD = carry[0] + b_dec_D[None] + error_TD
        if skip_DD is not None:
            write_TD = write_TD + read_TD @ skip_DD
        return jnp.roll(carry, -1, 0).at[-1].set(0), write_TD

    per_layer = (
        clt.W_enc_LFD, clt.b_enc_LF, clt.theta_LF, dec_LFMD, clt.b_dec_LD,
        clt.W_skip_LDD, error_LTD,
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
    return encode(clt, lrm.reads(done.taps.mid_TD), cfg=lrm.clt_cfg)
