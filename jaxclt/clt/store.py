"""Where a dictionary's weights come from: memory, or files read row by row.

Tracing needs every encoder once, but only the decoder rows of active features, so
rows are asked for by feature index and a store may read them lazily from disk.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from jaxclt.clt.config import CLTConfig
from jaxclt.types import CLTParams

__all__ = ["DictionaryStore", "EncoderLayer", "ParamsStore", "materialise"]


class EncoderLayer(NamedTuple):
    """The encoder of one layer; rows are features."""

    W_enc_FD: Any
    b_enc_F: Any
    theta_F: Any | None


class DictionaryStore(Protocol):
    """Read access to a dictionary, layer by layer, in the dtype it is stored in."""

    @property
    def cfg(self) -> CLTConfig:
        """Shape and conventions."""
        ...

    def encoder(self, layer: int) -> EncoderLayer:
        """All encoder rows of one layer."""
        ...

    def decoder(self, layer: int, feature_A: np.ndarray | None = None) -> np.ndarray:
        """Decoder rows [A, n_writes(layer), D] of some features, or of all."""
        ...

    def b_dec(self) -> np.ndarray:
        """Decoder biases [L, D]."""
        ...

    def skip(self, layer: int) -> np.ndarray | None:
        """Linear path [D, D] from what the encoder reads to the MLP output, or None."""
        ...


@dataclasses.dataclass(frozen=True)
class ParamsStore:
    """A dictionary held in memory as `CLTParams`."""

    params: CLTParams
    cfg: CLTConfig

    def encoder(self, layer: int) -> EncoderLayer:
        """All encoder rows of one layer."""
        p = self.params
        theta_F = None if p.theta_LF is None else np.asarray(p.theta_LF[layer])
        return EncoderLayer(
            np.asarray(p.W_enc_LFD[layer]), np.asarray(p.b_enc_LF[layer]), theta_F
        )

    def decoder(self, layer: int, feature_A: np.ndarray | None = None) -> np.ndarray:
        """Decoder rows [A, n_writes(layer), D] of some features, or of all."""
        rows = np.asarray(self.params.W_dec[layer])
        return rows if feature_A is None else rows[feature_A]

    def b_dec(self) -> np.ndarray:
        """Decoder biases [L, D]."""
        return np.asarray(self.params.b_dec_LD)

    def skip(self, layer: int) -> np.ndarray | None:
        """Linear path [D, D], or None."""
        W = self.params.W_skip_LDD
        return None if W is None else np.asarray(W[layer])


def materialise(store: DictionaryStore) -> CLTParams:
    """The whole dictionary as arrays in memory."""
    cfg = store.cfg
    enc = [store.encoder(layer) for layer in range(cfg.n_layers)]
    theta = [e.theta_F for e in enc if e.theta_F is not None]
    skip = [W for layer in range(cfg.n_layers) if (W := store.skip(layer)) is not None]
    return CLTParams(
        W_enc_LFD=jnp.stack([jnp.asarray(e.W_enc_FD) for e in enc]),
        b_enc_LF=jnp.stack([jnp.asarray(e.b_enc_F) for e in enc]),
        W_dec=tuple(jnp.asarray(store.decoder(layer)) for layer in range(cfg.n_layers)),
        b_dec_LD=jnp.asarray(store.b_dec()),
        theta_LF=jnp.stack([jnp.asarray(t) for t in theta]) if theta else None,
        W_skip_LDD=jnp.stack([jnp.asarray(W) for W in skip]) if skip else None,
    )
