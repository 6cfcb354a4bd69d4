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

from jaxclt.clt.coder import Loaded
from jaxclt.precision import jit
from jaxclt.replacement.model import written
from jaxclt.types import LMParams

__all__ = ["DENSE", "Reconstruction", "decoder_reach", "reconstructed"]

# Fields that have windows, and their axis.
_WINDOWS = {"error_LW": 1, "write_LWD": 1, "square_LW": 1, "active_W": 0, "token_W": 0}
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
        found = {
            name: np.concatenate([getattr(part, name) for part in parts], axis)
            for name, axis in _WINDOWS.items()
        }
        return cls(**found, count_LF=np.sum([part.count_LF for part in parts], axis=0))

    def where_tokens(self) -> Reconstruction:
        """Without windows that have no token that counts (those that fill a batch)."""
        some_W = self.token_W > 0
        kept: dict[str, Any] = {
            name: np.compress(some_W, getattr(self, name), axis)
            for name, axis in _WINDOWS.items()
        }
        return dataclasses.replace(self, **kept)

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


@partial(jit, static_argnames="n_groups")
def _sums(
    params: LMParams | None,
    loaded: Loaded,
    read_LTD: Array,
    write_LTD: Array,
    mask_T: Array,
    n_groups: int,
) -> dict[str, Array]:
    on_LTF, found_LTD = written(params, loaded, read_LTD)
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
    loaded: Loaded,
    read_LTD: Array | np.ndarray,
    write_LTD: Array | np.ndarray,
    mask_T: Array | np.ndarray | None = None,
    *,
    n_groups: int = 1,
    params: LMParams | None = None,
) -> Reconstruction:
    """Sums over some tokens.

    Args:
      loaded: the dictionary in memory.
      read_LTD: what its encoders read, see `jaxclt.clt.coder.Coder.site`.
      write_LTD: what the MLPs wrote.
      mask_T: which tokens count; None for all.
      n_groups: T falls into so many equal groups, one after the other.
      params: the model, for a dictionary whose weights are the model's own.
    """
    T = read_LTD.shape[1]
    own = jax.tree.leaves(loaded.weights)
    dtype = own[0].dtype if own else None
    found = _sums(
        params,
        loaded,
        jnp.asarray(read_LTD, dtype),
        jnp.asarray(write_LTD, dtype),
        jnp.ones(T, bool) if mask_T is None else jnp.asarray(mask_T),
        n_groups,
    )
    return Reconstruction(**{k: np.asarray(v, np.float64) for k, v in found.items()})


def decoder_reach(dec_LFMD: Array | np.ndarray) -> list[float]:
    """Share of the squared decoder norm by distance, source to target layer.

    Sparsity through the decoder norm can reward features that skip the layers between;
    a share that grows with distance says so.
    """
    total_M = np.square(np.asarray(dec_LFMD)).sum((0, 1, 3))
    return (total_M / max(total_M.sum(), 1e-30)).tolist()
