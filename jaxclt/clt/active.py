"""From a recording to the features that are active on this prompt.

The result holds all that attribution needs of a dictionary: for every active feature
its place, its activation, its encoder row and its decoder rows. How they came about
(a transcoder in memory, one on disk, the model's own neurons) no longer matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Coder, Dictionary, Encoded, in_dtype, picked, stream_rows
from jaxclt.clt.sites import fold_reads, read_scale, read_site
from jaxclt.errors import InputError
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.lm.step import Skip
from jaxclt.precision import jit
from jaxclt.types import Block, LMParams, Recording

__all__ = [
    "Active",
    "EncodedLayer",
    "FeatureReads",
    "active_features",
    "encode_at",
    "encoded_layers",
    "feature_reads",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Active:
    """Active features of one prompt, by layer, then position, then feature index.

    Host arrays. Rows of the dictionary are held once, however often their feature
    fires: `row_A` is a feature's row in its layer's tables of U encoder and decoder
    rows. Encoder rows are those of the residual stream: a norm before them is
    folded in, but for its denominator. With `read` such a row times that scale,
    ``preact = read · mid[layer, pos] + read_bias_A``, where the norm denominator (and a
    neuron's gate) are frozen.
    """

    layer_A: np.ndarray  # int32
    pos_A: np.ndarray  # int32
    feature_A: np.ndarray  # int32
    value_A: np.ndarray  # activation
    preact_A: np.ndarray
    read_bias_A: np.ndarray
    gate_A: np.ndarray  # a neuron's frozen gate, else 1
    row_A: np.ndarray  # int32
    encoder: tuple[np.ndarray, ...]  # per layer [U, D]
    decoder: tuple[np.ndarray, ...]  # per layer [U, n_writes(l), D], unscaled
    scale_LT: np.ndarray  # encoders read mid * scale
    write_bias_LD: np.ndarray  # decoder biases, and the constant part of a skip
    skip_LDD: np.ndarray | None = None  # linear path, (mid * scale) @ skip

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.decoder)

    @property
    def skip(self) -> Skip | None:
        """The linear path of all layers."""
        return None if self.skip_LDD is None else Skip(self.scale_LT, self.skip_LDD)

    def reads(self, index: np.ndarray | None = None) -> np.ndarray:
        """What features (by slot, all if None) read of the residual stream, [n, D]."""
        index = np.arange(len(self.layer_A)) if index is None else index
        read = np.empty((len(index), self.write_bias_LD.shape[1]), self.value_A.dtype)
        layer_n = self.layer_A[index]
        for layer in np.unique(layer_n):
            here = layer_n == layer
            slot = index[here]
            scale = self.scale_LT[layer, self.pos_A[slot]] * self.gate_A[slot]
            read[here] = self.encoder[layer][self.row_A[slot]] * scale[:, None]
        return read

    def decoder_rows(self, slots: slice | np.ndarray, layer: int) -> np.ndarray:
        """Decoder rows [n, n_writes, D] of some slots of one layer, unscaled."""
        return self.decoder[layer][self.row_A[slots]]

    def where(self, keep_A: np.ndarray) -> Active:
        """Some of the features; what the others wrote is left to the error nodes."""
        names = "layer_A pos_A feature_A value_A preact_A read_bias_A gate_A row_A"
        kept = {name: getattr(self, name)[keep_A] for name in names.split()}
        return dataclasses.replace(self, **kept)

    def of_layer(self, layer: int) -> slice:
        """The slots of one layer."""
        lo, hi = np.searchsorted(self.layer_A, [layer, layer + 1])
        return slice(int(lo), int(hi))


class EncodedLayer(NamedTuple):
    """One layer of a dictionary on a recording; host arrays in the recording's dtype.

    ``pre = gate * (scale * (row · mid) + constant)``, rows at the residual stream.
    """

    layer: int
    enc: Any  # encoders as the dictionary gave them
    pre_TF: np.ndarray
    on_TF: np.ndarray
    gate_TF: np.ndarray | None
    scale_T: np.ndarray  # see `Active.scale_LT`

    @property
    def a_TF(self) -> np.ndarray:  # noqa: N802
        """Activations."""
        return np.where(self.on_TF, self.pre_TF, 0)


def encoded_layers(
    dictionary: Dictionary, params: LMParams, recording: Recording, cfg: LMConfig
) -> Iterator[EncodedLayer]:
    """Encode a recording layer by layer.

    One layer at a time, so that neither all encoders nor dense activations of all
    layers are ever held together.

    Args:
      dictionary: of any kind.
      params: the model.
      recording: the clean pass.
      cfg: model shape.
    """
    coder, frozen = dictionary.coder(cfg), recording.frozen
    for layer in range(cfg.n_layers):
        enc = in_dtype(dictionary.encoders(params, layer), recording.mid_LTD.dtype)
        found = _encode_layer(
            params.blocks, layer, enc, recording.mid_LTD, frozen.mlp_scale_LT, coder
        )
        pre_TF, on_TF, gate_TF = (None if x is None else np.asarray(x) for x in found)
        scale_T = np.asarray(read_scale(coder.site, frozen.mlp_scale_LT[layer]))
        yield EncodedLayer(layer, enc, pre_TF, on_TF, gate_TF, scale_T)  # pyright: ignore


@partial(jit, static_argnames="coder")
def _encode_layer(
    blocks: Block, layer: Array, enc: Any, mid_LTD: Array, scale_LT: Array, coder: Coder
) -> tuple[Array, Array, Array | None]:
    p = jax.tree.map(lambda leaf: leaf[layer], blocks)
    read_TD = read_site(coder.site, mlp_norm(p), mid_LTD[layer], scale_LT[layer])
    found = coder.encode(p, enc, read_TD)
    return found.pre_TF, found.on_TF, found.gate_TF


@partial(jit, static_argnames="coder")
def encode_at(
    params: LMParams,
    recording: Recording,
    layer: Array | int,
    pos_E: Array | np.ndarray,
    enc: Any,
    *,
    coder: Coder,
) -> Encoded:
    """Features of one layer at some positions of a recording, [E, U].

    Args:
      params: the model.
      recording: the clean pass.
      layer: of the features.
      pos_E: where.
      enc: their encoders.
      coder: of the dictionary.
    """
    p = jax.tree.map(lambda leaf: leaf[layer], params.blocks)
    frozen, pos_E = recording.frozen, jnp.asarray(pos_E)
    scale_E = frozen.mlp_scale_LT[layer][pos_E]
    mid_ED = recording.mid_LTD[layer][pos_E]
    post_LT = frozen.post_mlp_scale_LT
    post_E = None if post_LT is None else post_LT[layer][pos_E]
    read_ED = read_site(coder.site, mlp_norm(p), mid_ED, scale_E)
    return coder.encode(p, enc, read_ED, post_E)


def active_features(
    dictionary: Dictionary,
    params: LMParams,
    recording: Recording,
    cfg: LMConfig,
    n_tokens: int | None = None,
) -> Active:
    """Encode a recording and gather the rows of the features that are on.

    One layer at a time, see `encoded_layers`.

    Args:
      dictionary: of any kind.
      params: the model.
      recording: the clean pass.
      cfg: model shape.
      n_tokens: length of the prompt, if the recording is padded beyond it: what fires
        after it would cost rows that nobody asks for.
    """
    coder, dtype = dictionary.coder(cfg), recording.mid_LTD.dtype
    parts, encoder, decoder, scales, biases, skips = [], [], [], [], [], []
    for layer, found in enumerate(encoded_layers(dictionary, params, recording, cfg)):
        pos, feature = np.nonzero(found.on_TF[:n_tokens])
        # A feature fires at several positions; its rows are read once.
        unique, row = np.unique(feature, return_inverse=True)
        enc = picked(dictionary, params, layer, unique, found.enc)
        rows_UD, const_U = stream_rows(coder, params, layer, in_dtype(enc, dtype))
        pre = found.pre_TF[pos, feature]
        gate = np.ones_like(pre)
        if found.gate_TF is not None:
            gate = found.gate_TF[pos, feature]
        parts.append(
            (
                np.full(len(pos), layer, np.int32),
                pos.astype(np.int32),
                feature.astype(np.int32),
                pre,
                gate,
                (gate * const_U[row]).astype(pre.dtype),
                row.astype(np.int32),
            )
        )
        encoder.append(rows_UD)
        decoder.append(in_dtype(dictionary.decoders(params, layer, unique), dtype))
        scales.append(found.scale_T)
        bias_D, skip_DD = _constant_rows(coder, dictionary, params, layer, dtype)
        biases.append(bias_D)
        if skip_DD is not None:
            skips.append(skip_DD)
    fields = [np.concatenate(column) for column in zip(*parts, strict=True)]
    layer_A, pos_A, feature_A, pre_A, gate_A, bias_A, row_A = fields
    return Active(
        layer_A=layer_A,
        pos_A=pos_A,
        feature_A=feature_A,
        value_A=pre_A,
        preact_A=pre_A,
        read_bias_A=bias_A,
        gate_A=gate_A,
        row_A=row_A,
        encoder=tuple(encoder),
        decoder=tuple(decoder),
        scale_LT=np.stack(scales),
        write_bias_LD=np.stack(biases),
        skip_LDD=np.stack(skips) if skips else None,
    )


def _constant_rows(
    coder: Coder, dictionary: Dictionary, params: LMParams, layer: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """What is written besides features: a bias [D], and a linear path of the stream."""
    fixed = in_dtype(dictionary.fixed(params, layer), dtype)
    bias_D = np.array(_bias(params.blocks, layer, fixed, coder))
    skip_DD = coder.skip(fixed)
    if skip_DD is None:
        return bias_D, None
    norm = mlp_norm(params.blocks).of_layer(layer)
    columns_DD, const_D = fold_reads(coder.site, norm, np.asarray(skip_DD).T)
    return bias_D + const_D, columns_DD.T


@partial(jit, static_argnames="coder")
def _bias(blocks: Block, layer: Array, fixed: Any, coder: Coder) -> Array:
    return coder.bias(jax.tree.map(lambda leaf: leaf[layer], blocks), fixed)


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
    """What given features, active or not, read of the residual stream.

    Args:
      dictionary: of any kind (gates are frozen).
      params: the model.
      recording: its clean pass.
      place_K3: layer, position and feature index of each.
      cfg: model shape.

    Raises:
      InputError: if there is no such layer, position or feature.
    """
    coder, (L, T, _) = dictionary.coder(cfg), recording.mid_LTD.shape
    sizes = {"layer": L, "position": T, "feature": coder.shape.n_features}
    dtype, found = recording.mid_LTD.dtype, []
    for place in place_K3.tolist():
        for (what, size), index in zip(sizes.items(), place, strict=True):
            if not 0 <= index < size:
                raise InputError(
                    f"there is no {what} {index}: give one from 0 to {size - 1}"
                )
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
