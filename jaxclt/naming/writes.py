"""The tokens that features raise and lower here, beyond what others do (maths 23.1).

A feature's summed decoder rows, with the sign of its activation, go past the final norm
and through the unembedding. Some tokens are raised by nearly every feature, so each
token's score is standardised by its mean and spread over features of the dictionary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.clt.coder import Dictionary
from jaxclt.lm.config import LMConfig
from jaxclt.naming.vocabulary import GROUP, highest, normed, written_logits
from jaxclt.precision import jit
from jaxclt.types import LMParams

__all__ = ["Spread", "Writes", "features_spread", "node_writes"]

SAMPLE = 512  # features that the spread is taken over: known to 3%
_ROWS = 128  # features whose scores are held together


class Spread(NamedTuple):
    """Scores of each token over features of a dictionary."""

    mean_V: Array
    scale_V: Array  # standard deviation


class Writes(NamedTuple):
    """By node: tokens raised and lowered most, and how far, in standard deviations."""

    raised_NK: np.ndarray
    raised_z_NK: np.ndarray
    lowered_NK: np.ndarray
    lowered_z_NK: np.ndarray  # positive: how far it is lowered
    share_N: np.ndarray  # of its scores' squares in these tokens


def features_spread(dictionary: Dictionary, params: LMParams, cfg: LMConfig) -> Spread:
    """Mean and spread of each token's score over `SAMPLE` features.

    They are evenly spaced in all layers; each counts by its direction alone.
    """
    L, F = cfg.n_layers, dictionary.coder(cfg).shape.n_features
    each = min(F, -(-SAMPLE // L))
    feature_U = np.unique(np.linspace(0, F - 1, each).astype(np.int64))
    rows = [
        np.asarray(dictionary.decoders(params, layer, feature_U)).sum(1)
        for layer in range(L)
    ]
    written_ND = np.concatenate(rows).astype(params.embed_VD.dtype)
    V = params.embed_VD.shape[0]
    total_V = square_V = jnp.zeros(V, written_ND.dtype)
    for part_RD, real_R in _parts(written_ND):
        total_V, square_V = _added(params, part_RD, real_R, total_V, square_V)
    mean_V = total_V / len(written_ND)
    variance_V = square_V / len(written_ND) - mean_V**2
    tiny = jnp.finfo(variance_V.dtype).tiny
    return Spread(mean_V, jnp.sqrt(jnp.maximum(variance_V, tiny)))


def node_writes(
    active: Active, node_N: np.ndarray, spread: Spread, params: LMParams, *, k: int = 5
) -> Writes:
    """What feature nodes write at their activations.

    Args:
      active: the features.
      node_N: slots of the nodes.
      spread: from `features_spread`.
      params: the model.
      k: tokens each way.
    """
    sign_N = np.sign(active.value_A[node_N])
    place = np.stack([active.layer_A[node_N], active.row_A[node_N], sign_N], 1)
    some, back_N = np.unique(place.astype(np.int64), axis=0, return_inverse=True)
    written_UD = np.array(
        [sign * active.decoder[layer][row].sum(0) for layer, row, sign in some.tolist()]
    ).reshape(len(some), params.embed_VD.shape[1])
    found = [
        [np.asarray(x)[real_R] for x in _strongest(params, spread, part_RD, k=k)]
        for part_RD, real_R in _parts(written_UD.astype(params.embed_VD.dtype))
    ]
    if not found:
        none = np.zeros((0, k))
        return Writes(none.astype(int), none, none.astype(int), none, none[:, 0])
    joined = (np.concatenate(x)[back_N.ravel()] for x in zip(*found, strict=True))
    return Writes(*joined)


def _parts(written_ND: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Vectors by `_ROWS`, the last ones padded, and which are real."""
    out = []
    for start in range(0, len(written_ND), _ROWS):
        part_RD = written_ND[start : start + _ROWS]
        n = _ROWS - len(part_RD)
        out.append((np.pad(part_RD, ((0, n), (0, 0))), np.arange(_ROWS) < _ROWS - n))
    return out


def _scores(params: LMParams, written_ND: Array) -> Array:
    """Demeaned logits [N, V] of directions."""
    length_N1 = jnp.linalg.norm(normed(params, written_ND), axis=1, keepdims=True)
    safe_N1 = jnp.where(length_N1 > 0, length_N1, jnp.ones_like(length_N1))
    return written_logits(params, written_ND / safe_N1)


@jit
def _added(
    params: LMParams, written_RD: Array, real_R: Array, total_V: Array, square_V: Array
) -> tuple[Array, Array]:
    score_RV = jnp.where(real_R[:, None], _scores(params, written_RD), 0)
    return total_V + score_RV.sum(0), square_V + (score_RV**2).sum(0)


@partial(jit, static_argnames="k")
def _strongest(
    params: LMParams, spread: Spread, written_RD: Array, *, k: int
) -> tuple[Array, ...]:
    score_RV = _scores(params, written_RD)
    z_RV = (score_RV - spread.mean_V[None]) / spread.scale_V[None]
    raised_z_RK, raised_RK = highest(z_RV, k, GROUP)
    lowered_z_RK, lowered_RK = highest(-z_RV, k, GROUP)
    first_RK = jnp.concatenate([raised_RK, lowered_RK], 1)
    square_RV = score_RV**2
    share_R = jnp.take_along_axis(square_RV, first_RK, 1).sum(1)
    whole_R = square_RV.sum(1)
    share_R = share_R / jnp.where(whole_R > 0, whole_R, jnp.ones_like(whole_R))
    return raised_RK, raised_z_RK, lowered_RK, lowered_z_RK, share_R
