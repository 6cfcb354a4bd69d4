"""How well a dictionary writes what the MLPs write: FVU, L0, silent and dense features.

Circuit Tracing (2025), section 5.1; maths 18.1. Everything is sums over tokens, kept by
window, so that windows can be drawn again for an interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.config import ReadSite
from jaxclt.clt.model import decode, encode
from jaxclt.clt.neurons import kept_neurons, read_neurons
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.replacement.model import Substitute
from jaxclt.types import CLTParams, LMParams

__all__ = ["DENSE", "Reconstruction", "decoder_reach", "read_site", "reconstructed"]

DENSE = 0.1  # a feature active on more of the tokens than this is called dense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Sums over the tokens that count, in float64; W groups of tokens (windows).

    Attributes:
      error_LW: squared error.
      write_LWD: the MLPs' outputs.
      square_LW: their squares.
      count_LF: tokens on which each feature is active.
      active_W: active features, all layers.
      token_W: tokens.
    """

    error_LW: np.ndarray
    write_LWD: np.ndarray
    square_LW: np.ndarray
    count_LF: np.ndarray
    active_W: np.ndarray
    token_W: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Reconstruction]) -> Reconstruction:
        """Several groups of windows as one."""
        axis = {"error_LW": 1, "write_LWD": 1, "square_LW": 1}
        found = {
            name: np.concatenate([getattr(part, name) for part in parts], n)
            for name, n in (axis | {"active_W": 0, "token_W": 0}).items()
        }
        return cls(**found, count_LF=np.sum([part.count_LF for part in parts], axis=0))

    def where_tokens(self) -> Reconstruction:
        """Without windows that have no token that counts (those that fill a batch)."""
        some_W = self.token_W > 0
        return dataclasses.replace(
            self,
            error_LW=self.error_LW[:, some_W],
            write_LWD=self.write_LWD[:, some_W],
            square_LW=self.square_LW[:, some_W],
            active_W=self.active_W[some_W],
            token_W=self.token_W[some_W],
        )

    def fvu_L(self, draw_W: np.ndarray | None = None) -> np.ndarray:  # noqa: N802
        """``Σ|y - ŷ|² / Σ|y - mean y|²`` by layer, of all windows or those drawn."""
        draw_W = np.arange(len(self.token_W)) if draw_W is None else draw_W
        return self.error_LW[:, draw_W].sum(1) / self._spread_L(draw_W)

    def _spread_L(self, draw_W: np.ndarray) -> np.ndarray:  # noqa: N802
        """``Σ|y - mean y|²`` by layer."""
        mean_LD = self.write_LWD[:, draw_W].sum(1) / self.token_W[draw_W].sum()
        square_L = self.square_LW[:, draw_W].sum(1)
        return square_L - self.token_W[draw_W].sum() * (mean_LD**2).sum(1)

    def fvu_W(self) -> np.ndarray:  # noqa: N802
        """What each window adds to the FVU, times W: its mean is the FVU."""
        spread_L = self._spread_L(np.arange(len(self.token_W)))
        return len(self.token_W) * (self.error_LW / spread_L[:, None]).mean(0)

    def l0(self, draw_W: np.ndarray | None = None) -> float:
        """Active features of a token, summed over layers."""
        draw_W = np.arange(len(self.token_W)) if draw_W is None else draw_W
        return float(self.active_W[draw_W].sum() / self.token_W[draw_W].sum())

    @property
    def density_LF(self) -> np.ndarray:  # noqa: N802
        """Share of the tokens on which each feature is active."""
        return self.count_LF / self.token_W.sum()

    def summary(self) -> dict[str, Any]:
        """FVU and L0 in all and by layer, share of silent and of dense features."""
        fvu_L, silent_LF = self.fvu_L(), self.count_LF == 0
        return {
            "fvu": float(fvu_L.mean()),
            "fvu_L": fvu_L.tolist(),
            "l0": self.l0(),
            "l0_L": self.density_LF.sum(1).tolist(),
            "dead": float(silent_LF.mean()),
            "dead_L": silent_LF.mean(1).tolist(),
            "dense": float((self.density_LF > DENSE).mean()),
            "heldout_tokens": int(self.token_W.sum()),
        }


def read_site(sub: Substitute) -> ReadSite:
    """Where a dictionary reads; neurons read the MLP's input."""
    return "mlp_in" if sub.clt_cfg is None else sub.clt_cfg.read


def _written(
    params: LMParams | None, sub: Substitute, read_LTD: Array, cfg: LMConfig | None
) -> tuple[Array, Array]:
    """Which features are active [L, T, F] and what they write [L, T, D]."""
    if sub.clt is not None:
        assert sub.clt_cfg is not None
        a_LTF = encode(sub.clt, read_LTD, cfg=sub.clt_cfg)
        return a_LTF != 0, decode(sub.clt, a_LTF, read_LTD)
    if params is None or cfg is None:
        raise ValueError("neurons need the model's params and cfg")

    def one(p: Any, read_TD: Array) -> tuple[Array, Array]:
        value_TI, _ = read_neurons(p, read_TD, cfg=cfg)
        keep_TI = kept_neurons(p, value_TI, k=sub.k, threshold=sub.threshold)
        if keep_TI is not None:
            value_TI = jnp.where(keep_TI, value_TI, 0)
        write_TD = value_TI @ layers.neuron_rows(p)
        if p.down_bias_LD is not None:
            write_TD = write_TD + p.down_bias_LD[None]
        return value_TI != 0, write_TD

    return jax.lax.map(lambda x: one(*x), (params.blocks, read_LTD))


@partial(jax.jit, static_argnames=("cfg", "n_groups"))
def _sums(
    params: LMParams | None,
    sub: Substitute,
    read_LTD: Array,
    write_LTD: Array,
    mask_T: Array,
    cfg: LMConfig | None,
    n_groups: int,
) -> dict[str, Array]:
    on_LTF, found_LTD = _written(params, sub, read_LTD, cfg)
    on_LTF = on_LTF & mask_T[None, :, None]
    L, T, _ = write_LTD.shape

    def grouped(x_LTX: Array) -> Array:
        x_LTX = jnp.where(mask_T[None, :, None], x_LTX, 0)
        return x_LTX.reshape(L, n_groups, T // n_groups, -1).sum(2)

    return {
        "error_LW": grouped(jnp.square(found_LTD - write_LTD)).sum(-1),
        "write_LWD": grouped(write_LTD),
        "square_LW": grouped(jnp.square(write_LTD)).sum(-1),
        "count_LF": on_LTF.sum(1),
        "active_W": on_LTF.reshape(L, n_groups, -1).sum((0, 2)),
        "token_W": mask_T.reshape(n_groups, -1).sum(1),
    }


def reconstructed(
    sub: Substitute,
    read_LTD: Array | np.ndarray,
    write_LTD: Array | np.ndarray,
    mask_T: Array | np.ndarray | None = None,
    *,
    n_groups: int = 1,
    params: LMParams | None = None,
    cfg: LMConfig | None = None,
) -> Reconstruction:
    """Sums over some tokens.

    Args:
      sub: from `jaxclt.replacement.model.substitute_of`.
      read_LTD: what its encoders read, see `read_site`.
      write_LTD: what the MLPs wrote.
      mask_T: which tokens count; None for all.
      n_groups: T falls into so many equal groups, one after the other.
      params: the model, for neurons.
      cfg: its shape, for neurons.
    """
    T = read_LTD.shape[1]
    dtype = sub.clt.W_enc_LFD.dtype if sub.clt is not None else None
    found = _sums(
        params if sub.clt is None else None,
        sub,
        jnp.asarray(read_LTD, dtype),
        jnp.asarray(write_LTD, dtype),
        jnp.ones(T, bool) if mask_T is None else jnp.asarray(mask_T),
        cfg if sub.clt is None else None,
        n_groups,
    )
    return Reconstruction(**{k: np.asarray(v, np.float64) for k, v in found.items()})


def decoder_reach(clt: CLTParams) -> list[float]:
    """Share of the squared decoder norm by distance, source to target layer.

    Sparsity through the decoder norm can reward features that skip the layers between;
    a share that grows with distance says so.
    """
    span = max(W.shape[1] for W in clt.W_dec)
    total = np.zeros(span)
    for W_FMD in clt.W_dec:
        total[: W_FMD.shape[1]] += np.square(np.asarray(W_FMD)).sum((0, 2))
    return (total / max(total.sum(), 1e-30)).tolist()
