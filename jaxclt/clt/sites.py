"""Where an encoder reads: maps between the residual stream and the read tensor.

With the norm denominator frozen, every read site is an affine map of the residual
stream where the MLP reads: that stream itself, or what its norm makes of it (maths
2.3). Graphs work at the residual stream, so encoder rows are pulled back through the
norm: its gain, and of a LayerNorm the removal of the mean, go into the row, its bias
into the encoder's, and the denominator, which each token has of its own, stays outside.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.config import ReadSite
from jaxclt.lm.layers import Norm, fold_norm, normalise

__all__ = ["fold_reads", "read_scale", "read_site", "reads_past_norm"]


def read_site(site: ReadSite, norm: Norm, mid_TD: Array, scale_T: Array) -> Array:
    """What encoders read of the residual stream at one layer, [T, D].

    Args:
      site: where the dictionary reads.
      norm: before the MLP.
      mid_TD: the residual stream where the MLP reads.
      scale_T: reciprocal denominator of the norm.
    """
    match site:
        case "resid_mid":
            return mid_TD
        case "normalized":
            gain = None if norm.gain is None else jnp.ones_like(norm.gain)
            return normalise(mid_TD, scale_T, Norm(gain, norm.bias), biases=False)
        case "mlp_in":
            return normalise(mid_TD, scale_T, norm)


def fold_reads(site: ReadSite, norm: Norm, W_FD: np.ndarray) -> tuple[Any, Any]:
    """Rows that read `read_site` as rows that read the stream, and their constants.

    ``W · read == scale * (W' · mid) + c`` with `read_scale`. On the host.

    Args:
      site: where the dictionary reads.
      norm: before the MLP.
      W_FD: the rows.

    Returns:
      W' [F, D] and c [F].
    """
    gain_D, bias_D = (None if x is None else np.asarray(x) for x in norm)
    zero_F = np.zeros(len(W_FD), W_FD.dtype)
    if gain_D is None:
        return W_FD, zero_F
    match site:
        case "resid_mid":
            return W_FD, zero_F
        case "normalized":
            plain = Norm(np.ones_like(gain_D), bias_D)  # pyright: ignore
            return fold_norm(W_FD, plain), zero_F  # pyright: ignore
        case "mlp_in":
            # numpy multiplies bfloat16 matrices to float32.
            const_F = zero_F if bias_D is None else (W_FD @ bias_D).astype(W_FD.dtype)
            return fold_norm(W_FD, Norm(gain_D, bias_D)), const_F  # pyright: ignore


def reads_past_norm(site: ReadSite) -> bool:
    """Whether encoders read past the norm before the MLP, not the stream itself."""
    return site != "resid_mid"


def read_scale(site: ReadSite, scale_T: Array) -> Array:
    """What folded rows are times: the reciprocal denominator, or one."""
    return scale_T if reads_past_norm(site) else jnp.ones_like(scale_T)
