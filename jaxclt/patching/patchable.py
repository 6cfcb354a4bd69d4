"""A recorded prompt that is ready to be patched, and what a patch holds of it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.coder import Coder, Dictionary
from jaxclt.clt.sites import read_site
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.patching.how import How
from jaxclt.types import Block, Held, LMParams, Recording

__all__ = [
    "Patchable",
    "hold_of",
    "make_patchable",
    "read",
]


@struct.dataclass
class Patchable:
    """A recording, the model that made it, and how the dictionary computes."""

    params: LMParams
    recording: Recording
    skip_LDD: Array | None  # linear path of the dictionary
    cfg: LMConfig = struct.field(pytree_node=False)
    coder: Coder = struct.field(pytree_node=False)


def make_patchable(
    dictionary: Dictionary, params: LMParams, recording: Recording, cfg: LMConfig
) -> Patchable:
    """Put a recording and the conventions of a dictionary together."""
    coder = dictionary.coder(cfg)
    skips = [
        coder.skip(dictionary.fixed(params, layer)) for layer in range(cfg.n_layers)
    ]
    skip_LDD = None
    if skips[0] is not None:
        dtype = recording.mid_LTD.dtype
        skip_LDD = jnp.stack([jnp.asarray(W, dtype) for W in skips])
    return Patchable(
        params=params, recording=recording, skip_LDD=skip_LDD, cfg=cfg, coder=coder
    )


def hold_of(recording: Recording, how: How) -> Held:
    """What a patch holds at its clean values."""
    f = recording.frozen
    pattern, norm = how.patterns == "frozen", how.norms == "frozen"
    return Held(
        pattern_LHTS=f.pattern_LHTS if pattern else None,
        clean_LTD=f.clean_LTD if pattern else None,
        attn_scale_LT=f.attn_scale_LT if norm else None,
        mlp_scale_LT=f.mlp_scale_LT if norm else None,
        out_scale_T=f.out_scale_T if norm else None,
        post_attn_scale_LT=f.post_attn_scale_LT if norm else None,
        post_mlp_scale_LT=f.post_mlp_scale_LT if norm else None,
    )


def read(model: Patchable, mid_TD: Array, scale_T: Array, p: Block) -> Array:
    """What the dictionary reads of the stream at one layer, [T, D]."""
    return read_site(model.coder.site, mlp_norm(p), mid_TD, scale_T)
