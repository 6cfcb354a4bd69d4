"""Sources that keep a target from firing, over text: what TWERA cannot see.

For a target j and a source i below it, over the tokens n where j is silent and would
fire without i's residual-direct edge V a_i q_j (maths 14.2):

    effect[j, i] = sum V a_i q_j 1(h_j <= theta_j < h_j - V a_i q_j)      (negative)
    released[j, i] = sum 1(h_j <= theta_j < h_j - V a_i q_j)

with h the pre-activation, theta the threshold, and q the reciprocal norm denominator
where the encoder reads after the norm, else 1. Each token takes a step for every pair,
so it is made for chosen targets.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Bound
from jaxclt.clt.subset import Subset
from jaxclt.errors import InputError
from jaxclt.global_weights.statistics import Encoders, Plan, watch
from jaxclt.global_weights.weights import virtual_block
from jaxclt.precision import jit
from jaxclt.types import LMParams

__all__ = ["inhibition_of", "rows_of_weights", "thresholds"]


def thresholds(on: Bound, subset: Subset, slot_R: np.ndarray) -> np.ndarray:
    """Thresholds [R] of some features of a subset.

    Raises:
      InputError: for TopK, whose features have none of their own.
    """
    theta_R = np.zeros(len(slot_R), on.dtype)
    for i, slot in enumerate(slot_R):
        layer, feature = int(subset.layer_U[slot]), subset.feature_U[slot : slot + 1]
        theta_1 = on.coder.thresholds(on.encoders(layer, feature))
        if theta_1 is None:
            raise InputError(
                "features of a TopK dictionary have no thresholds of their own: "
                "inhibition needs ReLU or JumpReLU"
            )
        theta_R[i] = theta_1[0]
    return theta_R


def rows_of_weights(on: Bound, subset: Subset, slot_R: np.ndarray) -> np.ndarray:
    """Virtual weights [R, U] into some features from all of a subset."""
    V_RU = np.zeros((len(slot_R), len(subset)), on.dtype)
    layer_R = subset.layer_U[slot_R]
    for to in np.unique(layer_R).tolist():
        row = np.flatnonzero(layer_R == to)
        target = (to, subset.feature_U[slot_R[row]])
        for of in range(to):
            chosen = subset.features(of)
            if len(chosen):
                block = virtual_block(on, target, (of, chosen))
                V_RU[row, subset.of_layer(of)] = block
    return V_RU


@partial(jit, static_argnames="plan")
def inhibition_of(
    params: LMParams,
    enc: Encoders,
    token_WS: Array,
    mask_WS: Array,
    slot_R: Array,
    theta_R: Array,
    V_RU: Array,
    *,
    plan: Plan,
) -> dict[str, Any]:
    """``effect_RU``, ``released_RU`` and the tokens ``n`` of a batch; see `watch`.

    Args:
      params: the model.
      enc: see `watch`, also for the next two.
      token_WS: windows.
      mask_WS: which positions count.
      slot_R: the targets' slots in the subset.
      theta_R: from `thresholds`.
      V_RU: from `rows_of_weights`.
      plan: static sizes.
    """
    seen = watch(params, enc, token_WS, mask_WS, plan=plan)
    layer_U = np.repeat(np.arange(plan.coder.shape.n_layers), np.diff(plan.starts))
    zero = jnp.zeros((), seen.a_UT.dtype)

    def one(x: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        slot, theta, V_U = x
        h_T = seen.pre_UT[slot]
        edge_UT = seen.a_UT * V_U[:, None]
        if plan.scaled:
            edge_UT = edge_UT * seen.scale_LT[jnp.asarray(layer_U)[slot]][None]
        silent_T = (h_T <= theta) & (seen.mask_T > 0)
        held_UT = silent_T[None] & (h_T[None] - edge_UT > theta)
        effect_U = jnp.where(held_UT, edge_UT, zero).sum(1)
        return effect_U, held_UT.astype(zero.dtype).sum(1)

    effect_RU, released_RU = jax.lax.map(one, (slot_R, theta_R, V_RU))
    return {
        "n": seen.mask_T.sum(),
        "effect_RU": effect_RU,
        "released_RU": released_RU,
    }
