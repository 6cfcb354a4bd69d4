"""What features read of the stream when a norm and their own gates answer to a change.

Graphs hold the denominator of the norm before the MLP and the gates of features, so
that a feature is linear in the stream. To first order a small change also moves both
(maths 22.2). Here is what that adds to a feature's read; which features are on stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Coder, Dictionary, in_dtype
from jaxclt.clt.sites import read_site, reads_past_norm
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import (
    live_reads,
    mlp_and_scale,
    mlp_norm,
    norm_scale,
    normalise,
    unit,
)
from jaxclt.precision import jit
from jaxclt.shapes import bucket
from jaxclt.types import Block, LMParams, Recording

__all__ = ["LiveReads", "live_feature_reads", "mlp_unit"]


class LiveReads(NamedTuple):
    """What is added to reads with everything held; their sum is the derivative."""

    norm_KD: np.ndarray  # by the denominator of the norm before the MLP
    gate_KD: np.ndarray  # by the feature's own gate


def mlp_unit(
    params: LMParams, recording: Recording, layer: int, pos_K: np.ndarray
) -> Array:
    """What the norm before an MLP makes of the clean stream, without gain and bias.

    [K, D], at some positions.
    """
    scale_LT = recording.frozen.mlp_scale_LT
    return _unit(params, recording.mid_LTD, scale_LT, layer, pos_K)


def _unit(
    params: LMParams, mid_LTD: Array, scale_LT: Array, layer: Any, pos_K: Any
) -> Array:
    mid_KD = jnp.asarray(mid_LTD)[layer, pos_K]
    scale_K = jnp.asarray(scale_LT)[layer, pos_K]
    return unit(mid_KD, scale_K, mlp_norm(params.blocks))


def live_feature_reads(
    dictionary: Dictionary,
    params: LMParams,
    recording: Recording,
    place_K3: np.ndarray,
    read_KD: Any,
    *,
    cfg: LMConfig,
) -> LiveReads:
    """What live norms and gates add to what features read.

    A neuron's gate moves with the stream, and with it the scale of a norm after the
    MLP, which is part of its gate.

    Args:
      dictionary: of any kind.
      params: the model.
      recording: its clean pass.
      place_K3: layer, position and feature index of each.
      read_KD: their reads, everything held.
      cfg: model shape.
    """
    coder, read_KD = dictionary.coder(cfg), np.asarray(read_KD)
    live_KD = read_KD
    if reads_past_norm(coder.site):
        live_KD = _past_norm(params, recording, place_K3, read_KD)
    whole_KD = live_KD
    if coder.gated:
        whole_KD = np.empty_like(read_KD)
        for layer in np.unique(place_K3[:, 0]).tolist():
            here = np.flatnonzero(place_K3[:, 0] == layer)
            _, pos, feature = place_K3[here].T
            unique, row = np.unique(feature, return_inverse=True)
            enc = in_dtype(dictionary.encoders(params, layer, unique), read_KD.dtype)
            # Sizes are bucketed so that layers and prompts share programs.
            pad = (0, bucket(len(row)) - len(row))
            row, pos = np.pad(row, pad), np.pad(pos, pad)
            enc = jax.tree.map(lambda x, row=row: x[row], enc)
            found = _whole_reads(params, recording, layer, pos, enc, cfg, coder)
            whole_KD[here] = np.asarray(found)[: len(here)]
    return LiveReads(live_KD - read_KD, whole_KD - live_KD)


def _past_norm(
    params: LMParams, recording: Recording, place_K3: np.ndarray, read_KD: np.ndarray
) -> np.ndarray:
    """Reads [K, D] past the norm before the MLP, live."""
    K = len(read_KD)
    pad = ((0, bucket(K) - K), (0, 0))
    layer_K, pos_K, _ = np.pad(place_K3, pad).T
    mid_LTD, scale_LT = recording.mid_LTD, recording.frozen.mlp_scale_LT
    live_KD = _live(params, mid_LTD, scale_LT, layer_K, pos_K, np.pad(read_KD, pad))
    return np.asarray(live_KD)[:K]


@jit
def _live(
    params: LMParams,
    mid_LTD: Array,
    scale_LT: Array,
    layer_K: Array,
    pos_K: Array,
    read_KD: Array,
) -> Array:
    return live_reads(read_KD, _unit(params, mid_LTD, scale_LT, layer_K, pos_K))


@partial(jit, static_argnames=("cfg", "coder"))
def _whole_reads(
    params: LMParams,
    recording: Recording,
    layer: Array,
    pos_K: Array,
    enc: Any,
    cfg: LMConfig,
    coder: Coder,
) -> Array:
    """Derivatives [K, D] of activations by the stream where their MLP reads.

    Args:
      params: the model.
      recording: its clean pass.
      layer: of the features.
      pos_K: where each is.
      enc: their encoders, a row for each.
      cfg: model shape.
      coder: of the dictionary.
    """
    p: Block = jax.tree.map(lambda leaf: leaf[layer], params.blocks)
    norm = mlp_norm(p)

    def activation(mid_D: Array, post: Array | None, row: Any) -> Array:
        mid_1D, row_1 = mid_D[None], jax.tree.map(lambda x: x[None], row)
        scale_1 = norm_scale(mid_1D, norm, eps=cfg.norm_eps)
        read_1D = read_site(coder.site, norm, mid_1D, scale_1)
        post_1 = None if post is None else post[None]
        return coder.encode(p, row_1, read_1D, post_1).pre_TF[0, 0]

    def post_scale(mid_D: Array) -> Array:
        mid_1D = mid_D[None]
        scale_1 = norm_scale(mid_1D, norm, eps=cfg.norm_eps)
        _, found = mlp_and_scale(p, normalise(mid_1D, scale_1, norm), cfg=cfg)
        assert found is not None, "there is a norm"
        return found[0]

    mid_TD = recording.mid_LTD[layer]
    if p.post_mlp_LD is None:
        by_mid = jax.vmap(jax.grad(lambda mid, row: activation(mid, None, row)))
        return by_mid(mid_TD[pos_K], enc)
    post_T, slope_TD = jax.lax.map(jax.value_and_grad(post_scale), mid_TD)
    by_both = jax.vmap(jax.grad(activation, argnums=(0, 1)))
    mid_KD, by_post_K = by_both(mid_TD[pos_K], post_T[pos_K], enc)
    return mid_KD + by_post_K[:, None] * slope_TD[pos_K]
