"""Global weights of one attention head: features feeding later positions through it.

A path that passes exactly one head h of layer l: a source below l writes to the stream
at position c', the head moves it to c, and a target of layer l or above reads it there
(above, where attention and MLP stand side by side).

    V_h[t, s] = <sum of s's decoders below l -> gain, W_V, W_O of h, t's encoder>
    ind_h[t, s] = sum over c of  1(a_t(c)) q_t(c) m_s(c)
    m_s(c) = sum over c' of  A_h(c, c') q_h(c') a_s(c')

with q the reciprocal norm denominators before the head (and after it, at c, where the
model has a norm there), and before the target's encoder where it reads after the norm:
n ERA = V_h ind_h is then exactly the sum over graphs of the edges' one-hop parts (maths
7.3, 17.10). There is no version without q here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Bound
from jaxclt.global_weights.weights import folded_encoder, summed_writes
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import attention_maps, scaled_pattern
from jaxclt.precision import jit
from jaxclt.types import Block, Held

__all__ = ["Head", "HeadReads", "head_block", "head_sums", "rows_by_layer"]

Head = tuple[int, int]  # layer, head


class HeadReads(NamedTuple):
    """What heads of a batch of windows are summed from; T = W S, window by window."""

    a_UT: Array  # activations, zero where a position does not count
    held: Held  # clean streams and scales, leaves [L, W, ..]
    scale_LT: Array | None  # before the MLPs, if encoders read after the norm


def head_sums(
    blocks: Block,
    seen: HeadReads,
    *,
    cfg: LMConfig,
    starts: Sequence[int],
    heads: Sequence[Head],
) -> dict[str, Any]:
    """``head_ind`` and ``head_act``, one matrix [targets, sources] for each head.

    Targets are the features from the head's layer on, sources those below it.

    Args:
      blocks: weights of the model.
      seen: what was recorded.
      cfg: model shape.
      starts: where layers start among the features.
      heads: which.
    """
    a_UT, held, scale_LT = seen
    assert held.attn_scale_LT is not None
    _, W, S = held.attn_scale_LT.shape
    a_UWS = a_UT.reshape(-1, W, S)
    found: dict[str, list[Array]] = {"head_ind": [], "head_act": []}
    pattern: dict[int, Array] = {}
    for layer, head in heads:
        if layer not in pattern:
            p, one = jax.tree.map(itemgetter(layer), (blocks, held))
            scaled = partial(scaled_pattern, p, cfg=cfg)
            pattern[layer] = jax.vmap(scaled)(one)
        pattern_WTS = pattern[layer][:, head]
        moved_UWS = jnp.einsum("WTS,UWS->UWT", pattern_WTS, a_UWS[: starts[layer]])
        moved_UT = moved_UWS.reshape(-1, W * S)
        target_UT = a_UT[starts[layer] :]
        on_UT = (target_UT != 0).astype(a_UT.dtype)
        if scale_LT is not None:
            scale_UT = rows_by_layer(scale_LT, starts, layer)
            target_UT, on_UT = target_UT * scale_UT, on_UT * scale_UT
        found["head_ind"].append(on_UT @ moved_UT.T)
        found["head_act"].append(target_UT @ moved_UT.T)
    return {name: tuple(tiles) for name, tiles in found.items()}


def rows_by_layer(scale_LT: Array, starts: Sequence[int], first: int = 0) -> Array:
    """A row for each feature from a layer on."""
    count_L = np.diff(np.asarray(starts))
    layer_U = np.repeat(np.arange(len(count_L)), count_L)
    return scale_LT[layer_U[layer_U >= first]]


@jit
def _maps(blocks: Block, layer: int, head: int, group: int) -> tuple[Array, Array]:
    """Value map and output map of one head, [C, D] each."""
    value_GCD, out_HCD = attention_maps(jax.tree.map(itemgetter(layer), blocks))
    return value_GCD[group], out_HCD[head]


@jit
def _through(read_RD: Array, write_ND: Array, value_CD: Array, out_CD: Array) -> Array:
    return read_RD @ ((write_ND @ value_CD.T) @ out_CD).T


def head_block(
    on: Bound,
    head: Head,
    target: tuple[int, np.ndarray],
    source: tuple[int, np.ndarray],
    *,
    cfg: LMConfig,
) -> np.ndarray:
    """Virtual weights [R, N] through one head between some features of two layers.

    Args:
      on: the dictionary on its model.
      head: layer and head.
      target: layer and feature indices [R]; zeros if it does not see the head.
      source: layer and feature indices [N]; zeros unless below the head's layer.
      cfg: model shape.
    """
    (to, feature_R), (of, feature_N) = target, source
    layer, h = head
    if not of < layer <= to - cfg.parallel:
        return np.zeros((len(feature_R), len(feature_N)), on.dtype)
    maps = _maps(on.params.blocks, layer, h, h // cfg.n_queries_per_kv)
    read_RD = jnp.asarray(folded_encoder(on, to, feature_R))
    write_ND = summed_writes(on, of, layer, feature_N)
    return np.asarray(_through(read_RD, write_ND, *maps))
