"""Activations of a dictionary, of any kind, from the stream of a batch of tokens.

`Active` is what a graph needs of one prompt; this is what passes over much text need:
dense activations, one layer at a time, inside a jitted scan.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxclt.clt.activations import activate
from jaxclt.clt.active import Dictionary
from jaxclt.clt.config import CLTConfig
from jaxclt.clt.neurons import NeuronDictionary, kept_neurons, neuron_values
from jaxclt.clt.sites import read_site
from jaxclt.clt.store import DictionaryStore
from jaxclt.errors import InputError
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import mlp_norm
from jaxclt.types import Block, LMParams

__all__ = ["Encoder", "encoder_of"]


@struct.dataclass
class Encoder:
    """The encoders of a transcoder, or which of the model's neurons count.

    Attributes:
      W_LFD: encoder rows; None for neurons, like the next two.
      b_LF: biases.
      theta_LF: JumpReLU thresholds, or None.
      threshold: least written norm of a neuron that counts, or None.
      lm: shape of the model.
      clt: shape of the transcoder; None for neurons.
      k: neurons that count at each layer and token; None for no such limit.
    """

    W_LFD: Array | None
    b_LF: Array | None
    theta_LF: Array | None
    threshold: Array | None
    lm: LMConfig = struct.field(pytree_node=False)
    clt: CLTConfig | None = struct.field(pytree_node=False)
    k: int | None = struct.field(pytree_node=False)

    @property
    def n_layers(self) -> int:
        """L, layers of the model."""
        return self.lm.n_layers

    @property
    def n_features(self) -> int:
        """F, features of a layer."""
        return self.lm.d_mlp if self.clt is None else self.clt.n_features

    @property
    def per_layer(self) -> tuple[Array | None, ...]:
        """Leaves with a leading L, to scan over; one layer of it is `layer`'s `x`."""
        return self.W_LFD, self.b_LF, self.theta_LF

    def layer(
        self, p: Block, x: tuple[Array | None, ...], mid_TD: Array, scale_T: Array
    ) -> Array:
        """Activations [T, F] of one layer, zero where a feature is not active.

        Args:
          p: one layer of the model's blocks.
          x: one layer of `per_layer`.
          mid_TD: the residual stream where the MLP reads.
          scale_T: reciprocal denominator of the norm before the MLP.
        """
        if self.clt is None:
            value_TI, _ = neuron_values(p, mid_TD, scale_T, cfg=self.lm)
            keep_TI = kept_neurons(p, value_TI, k=self.k, threshold=self.threshold)
            return value_TI if keep_TI is None else jnp.where(keep_TI, value_TI, 0)
        W_FD, b_F, theta_F = x
        assert W_FD is not None
        assert b_F is not None
        read_TD = read_site(self.clt.read, mlp_norm(p), mid_TD, scale_T)
        return activate(read_TD @ W_FD.T + b_F[None], theta_F, cfg=self.clt)


def encoder_of(dictionary: Dictionary, params: LMParams, cfg: LMConfig) -> Encoder:
    """The encoder of a dictionary, in the model's dtype.

    Args:
      dictionary: from `load_dictionary`.
      params: the model.
      cfg: its shape.

    Raises:
      InputError: for a dictionary of no known kind.
    """
    dtype = params.embed_VD.dtype
    if isinstance(dictionary, NeuronDictionary):
        least = dictionary.threshold
        return Encoder(
            W_LFD=None,
            b_LF=None,
            theta_LF=None,
            threshold=None if least is None else jnp.asarray(least, dtype),
            lm=cfg,
            clt=None,
            k=dictionary.k,
        )
    store: DictionaryStore | None = getattr(dictionary, "store", None)
    if store is None:
        raise InputError(f"dictionary {dictionary.name} has no encoders")
    rows = [store.encoder(layer) for layer in range(store.cfg.n_layers)]
    theta = [row.theta_F for row in rows if row.theta_F is not None]
    jump = store.cfg.activation == "jumprelu" and theta
    return Encoder(
        W_LFD=jnp.asarray(np.stack([row.W_enc_FD for row in rows]), dtype),
        b_LF=jnp.asarray(np.stack([row.b_enc_F for row in rows]), dtype),
        theta_LF=jnp.asarray(np.stack(theta), dtype) if jump else None,
        threshold=None,
        lm=cfg,
        clt=store.cfg,
        k=None,
    )
