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

from jaxclt.clt.coder import Encoded, Loaded, constant
from jaxclt.clt.sites import read_site
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.replacement.model import replaced
from jaxclt.types import Frozen, LMParams, Recording

__all__ = ["LocalReplacement", "LocalRun", "local_replacement", "run_local"]


@struct.dataclass
class LocalReplacement:
    """A model, a dictionary and one clean pass, frozen together."""

    params: LMParams
    loaded: Loaded
    frozen: Frozen
    embed_TD: Array  # clean sources
    error_LTD: Array
    cfg: LMConfig = struct.field(pytree_node=False)

    def reads(self, mid_LTD: Array) -> Array:
        """What the encoders read of a stream, norm denominators held, [L, T, D]."""
        site = partial(read_site, self.loaded.coder.site)
        norms = mlp_norm(self.params.blocks)
        return jax.vmap(site)(norms, mid_LTD, self.frozen.mlp_scale_LT)


@struct.dataclass
class LocalRun:
    """One pass through the local replacement model."""

    mid_LTD: Array
    pre_LTF: Array
    a_LTF: Array
    out_TD: Array  # normed output; jaxclt.lm.run.unembed gives logits


def local_replacement(
    params: LMParams, loaded: Loaded, recording: Recording, *, cfg: LMConfig
) -> LocalReplacement:
    """Freeze a recording and take up what the dictionary misses in error nodes.

    Args:
      params: the model.
      loaded: a dictionary of any kind, from `jaxclt.clt.coder.load`.
      recording: the clean pass.
      cfg: model shape.
    """
    found = _encoded(params, loaded, recording.frozen, recording.mid_LTD)
    return LocalReplacement(
        params=params,
        loaded=loaded,
        frozen=recording.frozen,
        embed_TD=recording.embed_TD,
        error_LTD=recording.write_LTD - _decoded(params, loaded, recording, found.a_TF),
        cfg=cfg,
    )


def _encoded(
    params: LMParams, loaded: Loaded, frozen: Frozen, mid_LTD: Array
) -> Encoded:
    """Features of every layer of a stream, norm denominators held, leading L."""

    def one(x: tuple) -> Encoded:
        p, w, mid_TD, scale_T, post_T = x
        read_TD = read_site(loaded.coder.site, mlp_norm(p), mid_TD, scale_T)
        return loaded.coder.encode(p, w.enc, read_TD, post_T)

    scales = frozen.mlp_scale_LT, frozen.post_mlp_scale_LT
    return jax.lax.map(one, (params.blocks, loaded.weights, mid_LTD, *scales))


def _decoded(
    params: LMParams, loaded: Loaded, recording: Recording, a_LTF: Array
) -> Array:
    """What the dictionary writes on the recording [L, T, D]."""
    coder = loaded.coder

    def step(ahead_MTD: Array, x: tuple) -> tuple[Array, Array]:
        p, w, a_TF, mid_TD, scale_T = x
        read_TD = read_site(coder.site, mlp_norm(p), mid_TD, scale_T)
        ahead_MTD = ahead_MTD + coder.write(p, w.dec, a_TF)
        write_TD = ahead_MTD[0] + constant(coder, p, w.fixed, read_TD)
        return jnp.roll(ahead_MTD, -1, 0).at[-1].set(0), write_TD

    _, T, D = recording.mid_LTD.shape
    none_MTD = jnp.zeros((coder.shape.span, T, D), recording.mid_LTD.dtype)
    scale_LT = recording.frozen.mlp_scale_LT
    xs = (params.blocks, loaded.weights, a_LTF, recording.mid_LTD, scale_LT)
    return jax.lax.scan(step, none_MTD, xs)[1]


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
    done = replaced(
        lrm.params,
        lrm.loaded,
        lrm.embed_TD if embed_TD is None else embed_TD,
        cfg=lrm.cfg,
        frozen=lrm.frozen,
        a_LTF=a_LTF,
        error_LTD=lrm.error_LTD if error_LTD is None else error_LTD,
    )
    mid_LTD = done.taps.mid_TD
    found = _encoded(lrm.params, lrm.loaded, lrm.frozen, mid_LTD)
    return LocalRun(
        mid_LTD=mid_LTD,
        pre_LTF=found.pre_TF,
        a_LTF=found.a_TF if a_LTF is None else a_LTF,
        out_TD=done.out_TD,
    )
