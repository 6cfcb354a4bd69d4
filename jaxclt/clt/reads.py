"""What any feature reads, active or not: its encoder row at the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Dictionary
from jaxclt.clt.neurons import NeuronDictionary, neuron_values
from jaxclt.clt.sites import fold_reads, read_scale
from jaxclt.clt.store import DictionaryStore
from jaxclt.errors import InputError
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.types import LMParams, Recording

__all__ = ["FeatureReads", "feature_reads"]


class FeatureReads(NamedTuple):
    """Pre-activations as ``read · mid[layer, pos] + bias``, what is frozen frozen."""

    read_KD: Array
    bias_K: Array


def feature_reads(
    dictionary: Dictionary,
    params: LMParams,
    recording: Recording,
    place_K3: np.ndarray,
    *,
    cfg: LMConfig,
) -> FeatureReads:
    """What given features read of the residual stream where the MLP reads.

    Args:
      dictionary: a transcoder, or the model's neurons (their gates are frozen).
      params: the model.
      recording: its clean pass.
      place_K3: layer, position and feature index of each.
      cfg: model shape.

    Raises:
      InputError: if there is no such layer, position or feature.
    """
    L, T = recording.mid_LTD.shape[:2]
    store = getattr(dictionary, "store", None)
    if isinstance(dictionary, NeuronDictionary):
        n_features = cfg.d_mlp
    elif store is not None:
        n_features = store.cfg.n_features
    else:
        raise InputError(f"dictionary {dictionary.name}: its encoders cannot be read")
    for layer, pos, feature in place_K3.tolist():
        _check("layer", layer, L)
        _check("position", pos, T)
        _check("feature", feature, n_features)
    found = [
        _neuron(params, recording, layer, pos, feature, cfg)
        if store is None
        else _encoder(store, params, recording, layer, pos, feature)
        for layer, pos, feature in place_K3.tolist()
    ]
    return FeatureReads(*(jnp.stack(column) for column in zip(*found, strict=True)))


def _check(what: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise InputError(f"there is no {what} {index}: give one from 0 to {size - 1}")


def _encoder(
    store: DictionaryStore,
    params: LMParams,
    recording: Recording,
    layer: int,
    pos: int,
    feature: int,
) -> tuple[Array, Array]:
    enc = store.encoder(layer)
    dtype = recording.mid_LTD.dtype
    row_1D = np.asarray(enc.W_enc_FD[feature], dtype)[None]
    row_1D, const_1 = fold_reads(
        store.cfg.read, mlp_norm(params.blocks).of_layer(layer), row_1D
    )
    scale_T = read_scale(store.cfg.read, recording.frozen.mlp_scale_LT[layer])
    bias = np.asarray(enc.b_enc_F[feature], dtype) + const_1[0]
    return jnp.asarray(row_1D[0]) * scale_T[pos], jnp.asarray(bias)


def _neuron(
    params: LMParams,
    recording: Recording,
    layer: int,
    pos: int,
    feature: int,
    cfg: LMConfig,
) -> tuple[Array, Array]:
    p = jax.tree.map(lambda leaf: leaf[layer], params.blocks)
    scale_T = recording.frozen.mlp_scale_LT[layer, pos : pos + 1]
    mid_TD = recording.mid_LTD[layer, pos : pos + 1]
    gate = neuron_values(p, mid_TD, scale_T, cfg=cfg)[1][0, feature]
    row_1D = np.asarray(p.up_LDI[:, feature])[None]
    row_1D, const_1 = fold_reads("mlp_in", mlp_norm(p), row_1D)
    bias = jnp.asarray(const_1[0])
    if p.up_bias_LI is not None:
        bias = bias + p.up_bias_LI[feature]
    return jnp.asarray(row_1D[0]) * (scale_T[0] * gate), gate * bias
