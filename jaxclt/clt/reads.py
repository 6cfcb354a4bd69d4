"""What any feature reads, active or not: its encoder row at the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import encode_at
from jaxclt.clt.coder import Dictionary, in_dtype, stream_rows
from jaxclt.clt.sites import read_scale
from jaxclt.errors import InputError
from jaxclt.lm.config import LMConfig
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
      dictionary: of any kind (gates are frozen).
      params: the model.
      recording: its clean pass.
      place_K3: layer, position and feature index of each.
      cfg: model shape.

    Raises:
      InputError: if there is no such layer, position or feature.
    """
    coder = dictionary.coder(cfg)
    L, T = recording.mid_LTD.shape[:2]
    dtype, found = recording.mid_LTD.dtype, []
    for layer, pos, feature in place_K3.tolist():
        _check("layer", layer, L)
        _check("position", pos, T)
        _check("feature", feature, coder.shape.n_features)
    for layer, pos, feature in place_K3.tolist():
        enc = dictionary.encoders(params, layer, np.array([feature]))
        enc = in_dtype(enc, dtype)
        row_1D, const_1 = stream_rows(coder, params, layer, enc)
        scale_T = read_scale(coder.site, recording.frozen.mlp_scale_LT[layer])
        gate = 1
        if coder.gated:
            at = np.array([pos])
            here = encode_at(params, recording, layer, at, enc, coder=coder)
            assert here.gate_TF is not None
            gate = here.gate_TF[0, 0]
        read_D = jnp.asarray(row_1D[0]) * (scale_T[pos] * gate)
        found.append((read_D, jnp.asarray(gate * const_1[0], dtype)))
    return FeatureReads(*(jnp.stack(column) for column in zip(*found, strict=True)))


def _check(what: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise InputError(f"there is no {what} {index}: give one from 0 to {size - 1}")
