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

import dataclasses
from functools import partial

import jax
from flax import struct
from jax import Array

from jaxclt.clt.coder import Encoded, Loaded
from jaxclt.clt.sites import read_site
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.precision import precise
from jaxclt.replacement.model import Sources, replaced, written
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


@precise
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
    lrm = LocalReplacement(
        params=params,
        loaded=loaded,
        frozen=recording.frozen,
        embed_TD=recording.embed_TD,
        error_LTD=recording.write_LTD,
        cfg=cfg,
    )
    post_LT = recording.frozen.post_mlp_scale_LT
    _, write_LTD = written(params, loaded, lrm.reads(recording.mid_LTD), post_LT)
    return dataclasses.replace(lrm, error_LTD=recording.write_LTD - write_LTD)


@precise
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
    given = Sources(
        embed_TD=lrm.embed_TD if embed_TD is None else embed_TD,
        error_LTD=lrm.error_LTD if error_LTD is None else error_LTD,
        a_LTF=a_LTF,
    )
    done = replaced(lrm.params, lrm.loaded, given, cfg=lrm.cfg, frozen=lrm.frozen)
    mid_LTD, coder = done.taps.mid_TD, lrm.loaded.coder

    def encoded(x: tuple) -> Encoded:
        p, w, read_TD, post_T = x
        return coder.encode(p, w.enc, read_TD, post_T)

    post_LT = lrm.frozen.post_mlp_scale_LT
    xs = (lrm.params.blocks, lrm.loaded.weights, lrm.reads(mid_LTD), post_LT)
    found = jax.lax.map(encoded, xs)
    return LocalRun(
        mid_LTD=mid_LTD,
        pre_LTF=found.pre_TF,
        a_LTF=found.a_TF if a_LTF is None else a_LTF,
        out_TD=done.out_TD,
    )
