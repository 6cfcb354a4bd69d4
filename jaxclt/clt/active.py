"""From a recording to the features that are active on this prompt.

The result holds all that attribution needs of a dictionary: for every active feature
its place, its activation, its encoder row and its decoder rows. How they came about
(a transcoder in memory, one on disk, the model's own neurons) no longer matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.config import CLTConfig, ReadSite
from jaxclt.clt.sites import fold_reads, read_scale, read_site
from jaxclt.clt.store import DictionaryStore, materialise
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import Norm, mlp_norm
from jaxclt.types import CLTParams, LMParams, Recording

__all__ = [
    "Active",
    "Dictionary",
    "EncodedLayer",
    "StoreDictionary",
    "active_features",
    "encoded_layers",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Active:
    """Active features of one prompt, by layer, then position, then feature index.

    Host arrays. Rows of the dictionary are held once, however often their feature
    fires: `row_A` is a feature's row in its layer's tables of U encoder and decoder
    rows. Encoder rows are those of the residual stream: a norm that they read behind is
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
    def skip(self) -> tuple[Array, Array] | None:
        """The linear path as `jaxclt.lm.frozen.replay` takes it."""
        if self.skip_LDD is None:
            return None
        return jnp.asarray(self.scale_LT), jnp.asarray(self.skip_LDD)

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


class Dictionary(Protocol):
    """Anything that names features: a transcoder, or the model's own neurons."""

    @property
    def name(self) -> str:
        """As the user gave it."""
        ...

    @property
    def hash(self) -> str:
        """Content hash, for the graph's meta data."""
        ...

    @property
    def labels(self) -> Mapping[tuple[int, int], str]:
        """What features stand for, by (layer, feature), as far as anybody said."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What was chosen where its name left a choice, as JSON; else empty."""
        ...

    def active(
        self,
        params: LMParams,
        recording: Recording,
        cfg: LMConfig,
        n_tokens: int | None = None,
    ) -> Active:
        """The features active on a recorded prompt of `n_tokens` (None: all)."""
        ...


@dataclasses.dataclass(frozen=True)
class StoreDictionary:
    """A transcoder whose weights come from a store."""

    store: DictionaryStore
    name: str = "transcoder"
    hash: str = ""
    labels: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cfg(self) -> CLTConfig:
        """Shape and conventions."""
        return self.store.cfg

    @property
    def params(self) -> CLTParams:
        """All weights, in memory."""
        return materialise(self.store)

    def active(
        self,
        params: LMParams,
        recording: Recording,
        cfg: LMConfig,
        n_tokens: int | None = None,
    ) -> Active:
        """The features active on a recorded prompt of `n_tokens` (None: all)."""
        del cfg
        return active_features(self.store, params, recording, n_tokens)


@partial(jax.jit, static_argnames="cfg")
def _encode_layer(
    W_enc_FD: Array, b_F: Array, theta_F: Array | None, read_TD: Array, cfg: CLTConfig
) -> tuple[Array, Array]:
    pre_TF = jnp.einsum("TD,FD->TF", read_TD, W_enc_FD) + b_F[None, :]
    return pre_TF, activate(pre_TF, theta_F, cfg=cfg)


class EncodedLayer(NamedTuple):
    """One layer of a dictionary on a recording; host arrays in the recording's dtype.

    ``pre = read @ W.T + b`` with `read` what the encoders read.
    """

    W_FD: np.ndarray
    b_F: np.ndarray
    theta_F: np.ndarray | None
    pre_TF: np.ndarray
    a_TF: np.ndarray
    scale_T: np.ndarray  # see `Active.scale_LT`
    site: ReadSite
    norm: Norm

    def folded(self, feature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of some features at the residual stream, and their constants.

        ``pre = scale * (row · mid) + constant``.
        """
        rows, const = fold_reads(self.site, self.norm, self.W_FD[feature])
        return rows, self.b_F[feature] + const


def encoded_layers(
    store: DictionaryStore, params: LMParams, recording: Recording
) -> Iterator[EncodedLayer]:
    """Encode a recording layer by layer.

    One layer at a time, so that neither all encoders nor dense activations of all
    layers are ever held together.

    Args:
      store: the dictionary.
      params: the model (its norms, for dictionaries that read behind them).
      recording: the clean pass.
    """
    cfg = store.cfg
    dtype = recording.mid_LTD.dtype
    norms = mlp_norm(params.blocks)
    for layer in range(cfg.n_layers):
        enc = store.encoder(layer)
        W_FD = np.asarray(enc.W_enc_FD, dtype)
        b_F = np.asarray(enc.b_enc_F, dtype)
        theta_F = None if enc.theta_F is None else np.asarray(enc.theta_F, dtype)
        norm, scale_T = norms.of_layer(layer), recording.frozen.mlp_scale_LT[layer]
        read_TD = read_site(cfg.read, norm, recording.mid_LTD[layer], scale_T)
        pre_TF, a_TF = map(np.asarray, _encode_layer(W_FD, b_F, theta_F, read_TD, cfg))
        scale_T = np.asarray(read_scale(cfg.read, scale_T))
        yield EncodedLayer(W_FD, b_F, theta_F, pre_TF, a_TF, scale_T, cfg.read, norm)


def active_features(
    store: DictionaryStore,
    params: LMParams,
    recording: Recording,
    n_tokens: int | None = None,
) -> Active:
    """Encode a recording and gather the rows of the features that fired.

    One layer at a time, see `encoded_layers`.

    Args:
      store: the dictionary.
      params: the model (its norms, for dictionaries that read behind them).
      recording: the clean pass.
      n_tokens: length of the prompt, if the recording is padded beyond it: what fires
        behind would cost rows that nobody asks for.
    """
    cfg = store.cfg
    dtype = recording.mid_LTD.dtype
    parts, encoder, decoder, scales = [], [], [], []
    write_bias_LD, skips = np.array(store.b_dec(), dtype), []
    for layer, enc in enumerate(encoded_layers(store, params, recording)):
        pos, feature = np.nonzero(enc.a_TF[:n_tokens])
        # A feature fires at several positions; its rows are read once.
        unique, row = np.unique(feature, return_inverse=True)
        rows_UD, bias_U = enc.folded(unique)
        parts.append(
            (
                np.full(len(pos), layer, np.int32),
                pos.astype(np.int32),
                feature.astype(np.int32),
                enc.a_TF[pos, feature],
                enc.pre_TF[pos, feature],
                bias_U[row],
                row.astype(np.int32),
            )
        )
        encoder.append(rows_UD)
        decoder.append(
            np.asarray(store.decoder_rows(layer, unique), dtype).reshape(
                len(unique), cfg.n_writes(layer), cfg.d_model
            )
        )
        scales.append(enc.scale_T)
        skip_DD = store.skip(layer)
        if skip_DD is not None:
            skip_DD = np.asarray(skip_DD, dtype).T
            columns_DD, const_D = fold_reads(cfg.read, enc.norm, skip_DD)
            skips.append(columns_DD.T)
            write_bias_LD[layer] += const_D
    fields = [np.concatenate(column) for column in zip(*parts, strict=True)]
    layer_A, pos_A, feature_A, value_A, preact_A, bias_A, row_A = fields
    return Active(
        layer_A=layer_A,
        pos_A=pos_A,
        feature_A=feature_A,
        value_A=value_A,
        preact_A=preact_A,
        read_bias_A=bias_A,
        gate_A=np.ones_like(value_A),
        row_A=row_A,
        encoder=tuple(encoder),
        decoder=tuple(decoder),
        scale_LT=np.stack(scales),
        write_bias_LD=write_bias_LD,
        skip_LDD=np.stack(skips) if skips else None,
    )
