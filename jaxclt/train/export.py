"""From training weights to a dictionary that anybody can use.

TopK and BatchTopK gates couple features (within a token, within a batch); a dictionary
for graphs, and circuit-tracer's format, need one threshold per feature. `calibrate`
finds one per layer that keeps the same number of features per token on training text.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.config import CLTConfig
from jaxclt.precision import jit
from jaxclt.train.params import LayerParams, Spec, TrainParams, to_clt
from jaxclt.types import CLTParams

__all__ = ["calibrate", "threshold_form"]


@partial(jit, static_argnames="k")
def _layer_threshold(p: LayerParams, read_TD: Array, k: int) -> Array:
    read_TD = read_TD.astype(p.W_enc_FD.dtype)
    pre_TF = read_TD @ p.W_enc_FD.T + p.b_enc_F[None]
    descending = -jnp.sort(-pre_TF.reshape(-1))
    n = k * len(pre_TF)
    if n >= descending.size:
        return jnp.zeros((), pre_TF.dtype)
    # Strictly above the middle of the gap: exactly k per token on average.
    return jnp.maximum((descending[n - 1] + descending[n]) / 2, 0.0)


def calibrate(params: TrainParams, read_LTD: np.ndarray | Array, k: int) -> Array:
    """One threshold per layer [L] that keeps k features per token on average.

    Fewer when less than k per token are positive, since thresholds are not negative.

    Args:
      params: weights, in the units of `read_LTD`.
      read_LTD: training tokens; some thousands.
      k: features per layer and token.
    """
    layers = zip(params, read_LTD, strict=True)
    return jnp.stack([_layer_threshold(p, jnp.asarray(x_TD), k) for p, x_TD in layers])


def threshold_form(
    params: TrainParams, spec: Spec, theta_L: Array | None = None
) -> tuple[CLTParams, CLTConfig]:
    """The dictionary in normalised units, its gate a threshold (or ReLU).

    Args:
      params: weights.
      spec: what was trained.
      theta_L: from `calibrate`; needed where features compete, ignored elsewhere.
    """
    clt, cfg = to_clt(params), spec.clt_config()
    if spec.gate.competes:
        assert theta_L is not None
        theta_LF = jnp.broadcast_to(theta_L[:, None], clt.b_enc_LF.shape)
        clt = dataclasses.replace(clt, theta_LF=theta_LF.astype(clt.b_enc_LF.dtype))
    return clt, cfg
