"""From a recording to the features that are active on this prompt.

The result holds all that attribution needs of a dictionary: for every active feature
its place, its activation, its encoder row and its decoder rows. How they came about
(a transcoder in memory, one on disk, the model's own neurons) no longer matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.sites import read_diagonal
from jaxclt.clt.store import DictionaryStore, materialise
from jaxclt.lm.config import LMConfig
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
    rows. With `read` the encoder row pulled back to the residual stream,
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
    diagonal_LTD: np.ndarray  # encoders read mid * diagonal
    write_bias_LD: np.ndarray  # decoder biases
    skip_LDD: np.ndarray | None = None  # linear path, (mid * diagonal) @ skip

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.decoder)

    @property
    def skip(self) -> tuple[Array, Array] | None:
        """The linear path as `jaxclt.lm.frozen.replay` takes it."""
        if self.skip_LDD is None:
            return None
        return jnp.asarray(self.diagonal_LTD), jnp.asarray(self.skip_LDD)

    def reads(self, index: np.ndarray | None = None) -> np.ndarray:
        """What features (by slot, all if None) read of the residual stream, [n, D]."""
        index = np.arange(len(self.layer_A)) if index is None else index
        read = np.empty((len(index), self.diagonal_LTD.shape[2]), self.value_A.dtype)
        layer_n = self.layer_A[index]
        for layer in np.unique(layer_n):
            here = layer_n == layer
            slot = index[here]
            diagonal = self.diagonal_LTD[layer, self.pos_A[slot]]
            gated = diagonal * self.gate_A[slot, None]
            read[here] = self.encoder[layer][self.row_A[slot]] * gated
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

    def active(self, params: LMParams, recording: Recording, cfg: LMConfig) -> Active:
        """The features active on a recorded prompt."""
        ...


@dataclasses.dataclass(frozen=True)
class StoreDictionary:
    """A transcoder whose weights come from a store."""

    store: DictionaryStore
    name: str = "transcoder"
    hash: str = ""
    labels: Mapping[tuple[int, int], str] = dataclasses.field(default_factory=dict)

    @property
    def cfg(self) -> CLTConfig:
        """Shape and conventions."""
        return self.store.cfg

    @property
    def params(self) -> CLTParams:
        """All weights, in memory."""
        return materialise(self.store)

    def active(self, params: LMParams, recording: Recording, cfg: LMConfig) -> Active:
        """The features active on a recorded prompt."""
        del cfg
        return active_features(self.store, params, recording)


@partial(jax.jit, static_argnames="cfg")
def _encode_layer(
    W_enc_FD: Array, b_F: Array, theta_F: Array | None, read_TD: Array, cfg: CLTConfig
) -> tuple[Array, Array]:
    pre_TF = jnp.einsum("TD,FD->TF", read_TD, W_enc_FD) + b_F[None, :]
    return pre_TF, activate(pre_TF, theta_F, cfg=cfg)


class EncodedLayer(NamedTuple):
    """One layer of a dictionary on a recording; host arrays in the recording's dtype.

    ``pre = (mid * diagonal) @ W_enc.T + b``.
    """

    W_FD: np.ndarray
    b_F: np.ndarray
    theta_F: np.ndarray | None
    diagonal_TD: np.ndarray
    pre_TF: np.ndarray
    a_TF: np.ndarray


def encoded_layers(
    store: DictionaryStore, params: LMParams, recording: Recording
) -> Iterator[EncodedLayer]:
    """Encode a recording layer by layer.

    One layer at a time, so that neither all encoders nor dense activations of all
    layers are ever held together.

    Args:
      store: the dictionary.
      params: the model (its norm gains, for dictionaries that read after the norm).
      recording: the clean pass.
    """
    cfg = store.cfg
    dtype = recording.mid_LTD.dtype
    for layer in range(cfg.n_layers):
        enc = store.encoder(layer)
        W_FD = np.asarray(enc.W_enc_FD, dtype)
        b_F = np.asarray(enc.b_enc_F, dtype)
        theta_F = None if enc.theta_F is None else np.asarray(enc.theta_F, dtype)
        diagonal_TD = np.asarray(
            read_diagonal(
                cfg.read,
                recording.frozen.mlp_scale_LT[layer],
                params.blocks.norm_mlp_LD[layer],
            )
        )
        read_TD = recording.mid_LTD[layer] * diagonal_TD
        pre_TF, a_TF = map(np.asarray, _encode_layer(W_FD, b_F, theta_F, read_TD, cfg))
        yield EncodedLayer(W_FD, b_F, theta_F, diagonal_TD, pre_TF, a_TF)


def active_features(
    store: DictionaryStore, params: LMParams, recording: Recording
) -> Active:
    """Encode a recording and gather the rows of the features that fired.

    One layer at a time, see `encoded_layers`.

    Args:
      store: the dictionary.
      params: the model (its norm gains, for dictionaries that read after the norm).
      recording: the clean pass.
    """
    cfg = store.cfg
    dtype = recording.mid_LTD.dtype
    parts, encoder, decoder, diagonals = [], [], [], []
    for layer, enc in enumerate(encoded_layers(store, params, recording)):
        pos, feature = np.nonzero(enc.a_TF)
        # A feature fires at several positions; its rows are read once.
        unique, row = np.unique(feature, return_inverse=True)
        parts.append(
            (
                np.full(len(pos), layer, np.int32),
                pos.astype(np.int32),
                feature.astype(np.int32),
                enc.a_TF[pos, feature],
                enc.pre_TF[pos, feature],
                enc.b_F[feature],
                row.astype(np.int32),
            )
        )
        encoder.append(enc.W_FD[unique])
        decoder.append(
            np.asarray(store.decoder_rows(layer, unique), dtype).reshape(
                len(unique), cfg.n_writes(layer), cfg.d_model
            )
        )
        diagonals.append(enc.diagonal_TD)
    skips = [store.skip(layer) for layer in range(cfg.n_layers)]
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
        diagonal_LTD=np.stack(diagonals),
        write_bias_LD=np.asarray(store.b_dec(), dtype),
        skip_LDD=None
        if skips[0] is None
        else np.stack([np.asarray(s, dtype) for s in skips]),
    )
