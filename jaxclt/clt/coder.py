"""What a dictionary is: the one protocol that everything else is written against.

A dictionary says where its weights are (`Dictionary`), and how one layer of them
computes (`Coder`, pure functions of arrays, traced once for all layers):

    linear = read · row + b            affine in what the layer reads
    a      = on · gate · linear        which features count, and times what
    write  = a · decoder               to its own and the following MLP outputs

Graphs hold `on` and `gate` at what they are on the prompt, as they hold attention
patterns: a transcoder's gate is 1, a neuron's is what its gate row says. A new kind of
dictionary is these two classes; see docs/maths.md and `tests/clt/test_new_kind.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.config import ReadSite, Shape
from jaxclt.clt.sites import fold_reads, read_site
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.types import Block, LMParams

__all__ = [
    "Bound",
    "Coder",
    "Dictionary",
    "Encoded",
    "Loaded",
    "Weights",
    "constant",
    "in_dtype",
    "load",
    "picked",
    "stream_rows",
]


class Encoded(NamedTuple):
    """Features of one layer on T tokens, [T, F]."""

    linear_TF: Array
    on_TF: Array  # bool
    gate_TF: Array | None = None  # None: 1

    @property
    def pre_TF(self) -> Array:  # noqa: N802
        """Pre-activations: what the activations are where they are on."""
        return self.linear_TF if self.gate_TF is None else self.gate_TF * self.linear_TF

    @property
    def a_TF(self) -> Array:  # noqa: N802
        """Activations."""
        pre_TF = self.pre_TF
        return jnp.where(self.on_TF, pre_TF, jnp.zeros((), pre_TF.dtype))


class Coder(Protocol):
    """How a kind of dictionary computes, a layer at a time; hashable, static in jit.

    Functions get one layer of the model's blocks `p` and of the dictionary's weights;
    weights that are None stand for the model's own.
    """

    @property
    def shape(self) -> Shape:
        """Sizes."""
        ...

    @property
    def site(self) -> ReadSite:
        """What the encoders read."""
        ...

    @property
    def gated(self) -> bool:
        """Whether features have a gate of the prompt's, which graphs hold."""
        ...

    @property
    def chooses(self) -> bool:
        """Whether `on` is a choice of what is listed, the rest being error."""
        ...

    @property
    def competes(self) -> bool:
        """Whether the other features of a layer decide if one is on."""
        ...

    @property
    def signed(self) -> bool:
        """Whether activations may be negative whatever the weights."""
        ...

    def encode(
        self, p: Block, enc: Any, read_TD: Array, post_T: Array | None = None
    ) -> Encoded:
        """Features of what a layer reads.

        Args:
          p: one layer of the model's blocks.
          enc: encoders of the layer, of all or of some features.
          read_TD: what they read, see `site`.
          post_T: recorded scale of a norm after the MLP; None computes it.
        """
        ...

    def rows(self, enc: Any) -> tuple[Any, Any]:
        """Rows [U, D] and biases [U] of encoders: ``linear = read @ rows.T + b``."""
        ...

    def thresholds(self, enc: Any) -> Any | None:
        """Where features switch on [U]; None where no threshold decides."""
        ...

    def write(self, p: Block, dec: Any, a_TF: Array) -> Array:
        """What activations write to the layer's and the following outputs [M, T, D]."""
        ...

    def bias(self, p: Block, fixed: Any) -> Array:
        """What is written whatever is active, [D]."""
        ...

    def skip(self, fixed: Any) -> Any | None:
        """A linear path [D, D] from what is read to what is written, or None."""
        ...


class Dictionary(Protocol):
    """Anything that names features: a transcoder, the model's neurons, your own kind.

    Weights are read layer by layer, so that none need be in memory together.
    """

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

    def coder(self, cfg: LMConfig) -> Coder:
        """How it computes on a model of this shape."""
        ...

    def encoders(
        self, params: LMParams, layer: int, feature_U: np.ndarray | None = None
    ) -> Any:
        """Encoders of some features, leaves with a leading U; None as `feature_U`: of
        all, or None if these are the model's own.
        """
        ...

    def decoders(
        self, params: LMParams, layer: int, feature_U: np.ndarray | None = None
    ) -> Any:
        """Decoder rows [U, n_writes(layer), D]; None as for `encoders`."""
        ...

    def fixed(self, params: LMParams, layer: int) -> Any:
        """What `Coder.bias` and `Coder.skip` take; None if it is the model's own."""
        ...


@struct.dataclass
class Weights:
    """Weights for a coder: of one layer, or of all with a leading L."""

    enc: Any = None
    dec: Any = None  # [F, M, D], padded to one M
    fixed: Any = None


@struct.dataclass
class Loaded:
    """A dictionary in memory, to scan over the layers of the model."""

    weights: Weights
    coder: Coder = struct.field(pytree_node=False)
    # Shape of the model it was loaded for, where it was.
    lm: LMConfig | None = struct.field(pytree_node=False, default=None)

    @property
    def n_layers(self) -> int:
        """L, layers of the model."""
        return self.coder.shape.n_layers

    @property
    def n_features(self) -> int:
        """F, features of a layer."""
        return self.coder.shape.n_features

    def layer(self, p: Block, w: Weights, mid_TD: Array, scale_T: Array) -> Array:
        """Activations [T, F] of one layer, zero where a feature is not active.

        Args:
          p: one layer of the model's blocks.
          w: one layer of `weights`.
          mid_TD: the residual stream where the MLP reads.
          scale_T: reciprocal denominator of the norm before the MLP.
        """
        read_TD = read_site(self.coder.site, mlp_norm(p), mid_TD, scale_T)
        return self.coder.encode(p, w.enc, read_TD).a_TF


@dataclasses.dataclass(frozen=True)
class Bound:
    """A dictionary on the model it is for; arrays in the model's dtype."""

    dictionary: Dictionary
    params: LMParams
    cfg: LMConfig

    @property
    def coder(self) -> Coder:
        """How it computes."""
        return self.dictionary.coder(self.cfg)

    @property
    def shape(self) -> Shape:
        """Sizes."""
        return self.coder.shape

    @property
    def dtype(self) -> Any:
        """Of the model."""
        return self.params.embed_VD.dtype

    def encoders(self, layer: int, feature_U: np.ndarray) -> Any:
        """Encoders of some features."""
        return in_dtype(
            self.dictionary.encoders(self.params, layer, np.asarray(feature_U)),
            self.dtype,
        )

    def decoders(self, layer: int, feature_U: np.ndarray) -> np.ndarray:
        """Decoder rows [U, n_writes(layer), D]."""
        return in_dtype(
            self.dictionary.decoders(self.params, layer, np.asarray(feature_U)),
            self.dtype,
        )

    def stream_rows(
        self, layer: int, feature_U: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encoder rows [U, D] at the residual stream and their constants [U].

        ``linear = scale * (row · mid) + constant``, with the reciprocal denominator of
        the norm before the MLP as the scale (or 1, see `jaxclt.clt.sites`).
        """
        return stream_rows(
            self.coder, self.params, layer, self.encoders(layer, feature_U)
        )


def stream_rows(
    coder: Coder, params: LMParams, layer: int, enc: Any
) -> tuple[np.ndarray, np.ndarray]:
    """`Bound.stream_rows` of given encoders."""
    W_UD, b_U = map(np.asarray, coder.rows(enc))
    norm = mlp_norm(params.blocks).of_layer(layer)
    W_UD, const_U = fold_reads(coder.site, norm, W_UD)
    return W_UD, b_U + const_U


def load(
    dictionary: Dictionary,
    params: LMParams,
    cfg: LMConfig,
    *,
    decoders: bool = True,
    feature_LU: Sequence[np.ndarray | None] | None = None,
) -> Loaded:
    """The weights of a dictionary in memory, in the model's dtype.

    Args:
      dictionary: of any kind.
      params: the model.
      cfg: its shape.
      decoders: False leaves them and all constants out: enough to encode.
      feature_LU: some features of each layer, as many of each; None takes all.
    """
    coder, dtype = dictionary.coder(cfg), params.embed_VD.dtype
    span = coder.shape.span

    def padded(dec: Any) -> Any:
        short = span - dec.shape[1]
        return np.pad(dec, ((0, 0), (0, short), (0, 0))) if short else dec

    layers = []
    for layer, feature_U in enumerate(feature_LU or [None] * cfg.n_layers):
        dec = dictionary.decoders(params, layer, feature_U) if decoders else None
        w = Weights(
            enc=dictionary.encoders(params, layer, feature_U),
            dec=None if dec is None else padded(dec),
            fixed=dictionary.fixed(params, layer) if decoders else None,
        )
        layers.append(in_dtype(w, dtype))
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)
    return Loaded(weights=stacked, coder=coder, lm=cfg)


def constant(coder: Coder, p: Block, fixed: Any, read_TD: Array) -> Array:
    """What a layer writes besides its features, [T, D]."""
    bias_TD = jnp.broadcast_to(coder.bias(p, fixed)[None], read_TD.shape)
    skip_DD = coder.skip(fixed)
    return bias_TD if skip_DD is None else bias_TD + read_TD @ skip_DD


def in_dtype(weights: Any, dtype: Any) -> Any:
    """Host arrays of the given dtype."""
    return jax.tree.map(lambda x: np.asarray(x, dtype), weights)


def picked(
    dictionary: Dictionary,
    params: LMParams,
    layer: int,
    feature_U: np.ndarray,
    whole: Any,
) -> Any:
    """Encoders of some features of a layer, out of those of all if they are at hand."""
    if not jax.tree.leaves(whole):
        return dictionary.encoders(params, layer, feature_U)
    return jax.tree.map(lambda x: x[feature_U], whole)
