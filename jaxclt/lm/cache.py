"""Keys and values of the positions that have been run, so that a new one runs alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxclt.lm import layers
from jaxclt.lm.block import Past, Taps
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams

__all__ = ["past_of"]


def past_of(params: LMParams, taps: Taps, *, cfg: LMConfig, room: int) -> Past:
    """Keys and values of a pass, [L, T + room, G, C] each, zero behind it.

    They come from what the pass read: its stream and its norm denominators, live or
    held, patched or not.

    Args:
      params: model weights.
      taps: of the pass, leaves with a leading L.
      cfg: model shape.
      room: positions to come.
    """

    def one(p: Block, resid_TD: Array, scale_T: Array) -> Past:
        normed_TD = layers.normalise(resid_TD, scale_T, p.norm_attn_LD)
        return Past(layers.keys(p, normed_TD, cfg=cfg), layers.values(p, normed_TD))

    past = jax.vmap(one)(params.blocks, taps.resid_TD, taps.attn_scale_T)
    return jax.tree.map(
        lambda x_LTGC: jnp.pad(x_LTGC, [(0, 0), (0, room), (0, 0), (0, 0)]), past
    )
