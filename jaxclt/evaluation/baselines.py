"""Thresholded neurons as the baseline that needs no training.

Circuit Tracing (2025), section 5.1.2: neurons below a threshold are cut off, and the
threshold is swept. Here it is a written norm, the same in all layers, chosen so that a
wanted number of neurons is active on a token: baselines are compared at equal L0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.neurons import NeuronCoder
from jaxclt.io.model import Model
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm, neuron_rows, normalise
from jaxclt.lm.run import record
from jaxclt.precision import jit
from jaxclt.text.windows import TokenWindows
from jaxclt.types import LMParams

__all__ = ["neuron_thresholds"]

SAMPLE = 512  # tokens that thresholds are chosen on


@partial(jit, static_argnames="cfg")
def _written_norms(params: LMParams, token_S: Array, cfg: LMConfig) -> Array:
    """``|a| * ||W_down||`` of every neuron, [L, S, I]."""
    done = record(params, jnp.maximum(token_S, 0), cfg=cfg, keep_patterns=False)

    def one(x: tuple) -> Array:
        p, mid_TD, scale_T = x
        normed_TD = normalise(mid_TD, scale_T, mlp_norm(p))
        value_TI = NeuronCoder(cfg).encode(p, None, normed_TD).pre_TF
        return jnp.abs(value_TI) * jnp.linalg.norm(neuron_rows(p), axis=-1)[None]

    return jax.lax.map(one, (params.blocks, done.mid_LTD, done.frozen.mlp_scale_LT))


def neuron_thresholds(
    model: Model, windows: TokenWindows, l0: Sequence[float]
) -> list[float]:
    """Thresholds (`neurons@x`) at which so many neurons are active on a token.

    Args:
      model: from `load_model`.
      windows: of text; the first few are used.
      l0: wanted numbers of active neurons of a token, all layers together.

    Returns:
      For each a threshold, rounded to three digits.
    """
    sizes, n = [], 0
    for token_S, mask_S in zip(windows.token_WS, windows.mask_WS, strict=True):
        token_S = jnp.asarray(token_S)
        found_LSI = np.asarray(_written_norms(model.params, token_S, model.cfg))
        sizes.append(found_LSI[:, mask_S].ravel())
        n += int(mask_S.sum())
        if n >= SAMPLE:
            break
    size = np.concatenate(sizes)
    found = []
    for wanted in l0:
        kept = int(np.clip(round(wanted * n), 1, len(size)))
        least = np.partition(size, len(size) - kept)[len(size) - kept]
        found.append(float(f"{least:.3g}"))
    return found
