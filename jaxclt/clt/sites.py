"""Where an encoder reads: maps between the residual stream and the read tensor.

With the norm denominator frozen, every read site is a diagonal map of the residual
stream after attention: ``read = mid · scale[t] · gain[d]`` (spec 3.1). Graphs work at
the residual stream, so encoder rows are pulled back through the same diagonal.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxclt.clt.config import ReadSite

__all__ = ["read_diagonal"]


def read_diagonal(site: ReadSite, scale_T: Array, gain_D: Array) -> Array:
    """The diagonal [T, D] with ``read_TD = mid_TD * diagonal`` at one layer.

    Args:
      site: where the dictionary reads.
      scale_T: reciprocal denominator of the norm before the MLP.
      gain_D: gain of that norm.
    """
    match site:
        case "resid_mid":
            return jnp.ones((scale_T.shape[0], gain_D.shape[0]), scale_T.dtype)
        case "normalized":
            return jnp.broadcast_to(scale_T[:, None], (len(scale_T), len(gain_D)))
        case "mlp_in":
            return scale_T[:, None] * gain_D[None, :]
