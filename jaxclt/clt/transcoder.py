"""Transcoders as a dictionary: cross-layer, per-layer, and any span between."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Encoded, Loaded, Weights
from jaxclt.clt.config import CLTConfig, ReadSite
from jaxclt.clt.store import DictionaryStore, EncoderLayer, materialise
from jaxclt.lm.config import LMConfig
from jaxclt.precision import precise
from jaxclt.types import Block, CLTParams, LMParams

__all__ = ["Fixed", "StoreDictionary", "TranscoderCoder", "loaded_params"]


class Fixed(NamedTuple):
    """What a transcoder writes whatever is active."""

    b_dec_D: Any
    skip_DD: Any | None  # ``read @ skip``


@dataclasses.dataclass(frozen=True)
class TranscoderCoder:
    """How a transcoder computes, see `jaxclt.clt.coder.Coder`."""

    shape: CLTConfig

    gated = False
    chooses = False

    @property
    def site(self) -> ReadSite:
        """What the encoders read."""
        return self.shape.read

    @property
    def competes(self) -> bool:
        """Whether the other features of a layer decide if one is on."""
        return self.shape.gate.competes

    @property
    def signed(self) -> bool:
        """Whether activations may be negative whatever the weights."""
        return self.shape.gate.signed

    @precise
    def encode(
        self,
        p: Block,
        enc: EncoderLayer,
        read_TD: Array,
        post_T: Array | None = None,
    ) -> Encoded:
        """``read @ W.T + b``, and where its activation is not zero."""
        del p, post_T
        pre_TF = jnp.einsum("TD,FD->TF", read_TD, enc.W_enc_FD) + enc.b_enc_F[None, :]
        theta_F = None if enc.theta_F is None else jnp.asarray(enc.theta_F)
        on_TF = self.shape.gate.is_on(pre_TF, theta_F, self.shape.k)
        return Encoded(pre_TF, on_TF)

    def rows(self, enc: EncoderLayer) -> tuple[Any, Any]:
        """Encoder rows and biases."""
        return enc.W_enc_FD, enc.b_enc_F

    def thresholds(self, enc: EncoderLayer) -> Any | None:
        """Those of the features, or zero; none where features compete."""
        if self.competes:
            return None
        own = self.shape.gate.switch == "theta"
        return enc.theta_F if own else np.zeros_like(enc.b_enc_F)

    @precise
    def write(self, p: Block, dec: Array, a_TF: Array) -> Array:
        """Activations times decoder rows."""
        del p
        return jnp.einsum("TF,FMD->MTD", a_TF, dec)

    def bias(self, p: Block, fixed: Fixed) -> Array:
        """Decoder bias."""
        del p
        return fixed.b_dec_D

    def skip(self, fixed: Fixed) -> Any | None:
        """The linear skip."""
        return fixed.skip_DD


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

    def coder(self, cfg: LMConfig) -> TranscoderCoder:
        """How it computes."""
        del cfg
        return TranscoderCoder(self.store.cfg)

    def encoders(
        self, params: LMParams, layer: int, feature_U: np.ndarray | None = None
    ) -> EncoderLayer:
        """Encoders of some features of a layer, or of all."""
        del params
        enc = self.store.encoder(layer)
        if self.cfg.gate.switch != "theta":
            enc = enc._replace(theta_F=None)
        if feature_U is None:
            return enc
        return EncoderLayer(*(None if x is None else x[feature_U] for x in enc))

    def decoders(
        self, params: LMParams, layer: int, feature_U: np.ndarray | None = None
    ) -> np.ndarray:
        """Decoder rows [U, n_writes(layer), D] of some features, or of all."""
        del params
        rows = np.asarray(self.store.decoder(layer, feature_U))
        return rows.reshape(len(rows), self.cfg.n_writes(layer), self.cfg.d_model)

    def fixed(self, params: LMParams, layer: int) -> Fixed:
        """Decoder bias, and the linear skip."""
        del params
        return Fixed(self._b_dec[layer], self.store.skip(layer))

    @functools.cached_property
    def _b_dec(self) -> np.ndarray:
        return self.store.b_dec()


def loaded_params(clt: CLTParams, cfg: CLTConfig) -> Loaded:
    """A transcoder in memory; differentiable in its weights."""
    dec_LFMD = jnp.stack(
        [jnp.pad(W, ((0, 0), (0, cfg.span - W.shape[1]), (0, 0))) for W in clt.W_dec]
    )
    weights = Weights(
        enc=EncoderLayer(clt.W_enc_LFD, clt.b_enc_LF, clt.theta_LF),
        dec=dec_LFMD,
        fixed=Fixed(clt.b_dec_LD, clt.W_skip_LDD),
    )
    return Loaded(weights=weights, coder=TranscoderCoder(cfg))
