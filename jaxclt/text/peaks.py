"""One batch of windows through the model: where in each window each feature peaks.

    windows --block by block--> activations [W, S, N] of one layer --> `Peaks` of it

Only one layer's activations exist at a time. They are made where the block's own MLP
runs, so that the compiler computes what both need, a neuron above all, once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jaxclt.clt.coder import Loaded
from jaxclt.lm.block import block
from jaxclt.lm.layers import mlp_at
from jaxclt.lm.run import embed
from jaxclt.types import LMParams

__all__ = ["Batch", "Peaks", "batch_peaks", "firing_counts"]


@struct.dataclass
class Peaks:
    """What features did in W windows; all leaves have a leading L, N features a layer.

    Z is the sides of zero that activations are on: above, and below if they may be.

    Attributes:
      value_ZWN: the activation of a side that is largest by size; 0 if none.
      pos_ZWN: int32, the first position that has it.
      count_N: int32, positions where a feature was active.
      low_N: least activation where active; +inf if never.
      high_N: largest activation where active; -inf if never.
      start_ZWN: int32, where the excerpt starts.
      act_ZWCN: activations from there.
      priority_WN: int32 above 0, the order in which windows are drawn, largest first.
      sample_HSN: activations in the windows that histograms are made of.
    """

    value_ZWN: Array
    pos_ZWN: Array
    start_ZWN: Array
    count_N: Array
    low_N: Array
    high_N: Array
    act_ZWCN: Array
    priority_WN: Array
    sample_HSN: Array


@struct.dataclass
class Batch:
    """W windows of one batch.

    Attributes:
      token_WS: int32, negative after the text.
      mask_WS: bool, which positions count.
      window_W: uint32, their numbers in the text.
      sample_H: int32, rows that histograms are made of.
    """

    token_WS: Array
    mask_WS: Array
    window_W: Array
    sample_H: Array


def _layers(
    params: LMParams,
    encoder: Loaded,
    batch: Batch,
    per_layer: Any,
    each: Any,
) -> Any:
    """Scan over layers; `each` reduces a layer's activations [W, S, F]."""
    cfg = encoder.lm
    assert cfg is not None

    def step(resid_WSD: Array, xs: Any) -> tuple[Array, Any]:
        p, x, layer, more = xs

        def one(resid_SD: Array) -> tuple[Array, Array]:
            seen: list[Array] = []

            def write(mid_SD: Array, scale_S: Array) -> Array:
                seen.append(encoder.layer(p, x, mid_SD, scale_S))
                return mlp_at(p, mid_SD, scale_S, cfg=cfg)[0]

            out_SD, _ = block(p, resid_SD, write, cfg=cfg, keep_patterns=False)
            return out_SD, seen[0]

        resid_WSD, a_WSF = jax.vmap(one)(resid_WSD)
        a_WSF = jnp.where(batch.mask_WS[:, :, None], a_WSF, 0)
        return resid_WSD, each(layer, a_WSF, more)

    embed_WSD = jax.vmap(partial(embed, params))(jnp.maximum(batch.token_WS, 0))
    layer_L = jnp.arange(cfg.n_layers, dtype=jnp.uint32)
    xs = (params.blocks, encoder.weights, layer_L, per_layer)
    return jax.lax.scan(step, embed_WSD, xs)[1]


def batch_peaks(
    params: LMParams,
    encoder: Loaded,
    pick_LN: Array | None,
    key: Array,
    batch: Batch,
    *,
    context: int,
    signed: bool,
    narrowed: bool = False,
) -> Peaks:
    """Where features peak in a batch of windows, and how they look around there.

    Args:
      params: the model.
      encoder: of the dictionary.
      pick_LN: features of each layer that are asked for; None for all.
      key: of the priorities, which depend on layer, feature and window alone.
      batch: the windows.
      context: tokens of an excerpt.
      signed: whether activations may be negative.
      narrowed: whether `encoder` has these features only.
    """
    S = batch.token_WS.shape[1]
    C, before = context, context * 3 // 4
    length_W = (batch.token_WS >= 0).sum(1, dtype=jnp.int32)

    def each(layer: Array, a_WSN: Array, pick_N: Array | None) -> Peaks:
        with jax.named_scope("priority"):

            def drawn(window: Array) -> Array:
                own = jax.random.fold_in(jax.random.fold_in(key, window), layer)
                return jax.random.bits(own, (encoder.n_features,), jnp.uint32)

            # 31 bits, and never 0, which stands for a window without the feature.
            priority_WN = (jax.vmap(drawn)(batch.window_W) >> 1).astype(jnp.int32) | 1
        if pick_N is not None:
            priority_WN = priority_WN[:, pick_N]
            a_WSN = a_WSN if narrowed else a_WSN[:, :, pick_N]
        with jax.named_scope("peaks"):
            sides, low_N, high_N = _extremes(a_WSN, signed)
            pos_S = jnp.arange(S, dtype=jnp.int32)[None, :, None]
            places = [
                jnp.where(a_WSN == value_WN[:, None], pos_S, S).min(1)
                for value_WN in sides
            ]
            value_ZWN, pos_ZWN = jnp.stack(sides), jnp.stack(places)
            count_N = (a_WSN != 0).sum(1, dtype=jnp.int32).sum(0)
        with jax.named_scope("excerpts"):
            # Three quarters before the peak, but inside the text.
            last_1W1 = jnp.maximum(length_W - C, 0)[None, :, None]
            start_ZWN = jnp.clip(pos_ZWN - before, 0, last_1W1)
            room = max(C - S, 0)
            padded = jnp.pad(a_WSN, ((0, 0), (0, room), (0, 0)))
            offset_1C1 = jnp.arange(C, dtype=jnp.int32)[None, :, None]
            excerpts = [
                jnp.take_along_axis(padded, start_WN[:, None] + offset_1C1, 1)
                for start_WN in start_ZWN
            ]
        return Peaks(
            value_ZWN,
            pos_ZWN,
            start_ZWN,
            count_N,
            low_N,
            high_N,
            jnp.stack(excerpts),
            jnp.where((value_ZWN != 0).any(0), priority_WN, 0),
            a_WSN[batch.sample_H],
        )

    return _layers(params, encoder, batch, pick_LN, each)


def _extremes(a_WSN: Array, signed: bool) -> tuple[tuple[Array, ...], Array, Array]:
    """The largest of each side [W, N], and least and largest where active [N].

    Written in maxima without a common operand: XLA's CPU backend fuses more than a few
    reductions of the same mask into one loop that is ten times slower than they are.
    """
    inf = jnp.asarray(jnp.inf, a_WSN.dtype)

    def least_above(a: Array) -> Array:
        return -jnp.where(a > 0, -a, -inf).max(1).max(0)

    high_WN = a_WSN.max(1)
    high_N = high_WN.max(0)
    if not signed:
        return (high_WN,), least_above(a_WSN), jnp.where(high_N > 0, high_N, -inf)
    low_WN = a_WSN.min(1)
    low_N = low_WN.min(0)

    def strict(a: Array) -> tuple[Array, Array]:
        """Where a feature has one sign only: zeros are no activations."""
        return (
            jnp.where(low_N < 0, low_N, least_above(a)),
            jnp.where(high_N > 0, high_N, -least_above(-a)),
        )

    one_sign = ((low_N == 0) | (high_N == 0)).any()
    low_N, high_N = jax.lax.cond(one_sign, strict, lambda a: (low_N, high_N), a_WSN)
    return (jnp.maximum(high_WN, 0), jnp.minimum(low_WN, 0)), low_N, high_N


def firing_counts(params: LMParams, encoder: Loaded, batch: Batch) -> Array:
    """On how many positions of a batch each feature is active, [L, F]."""

    def each(layer: Array, a_WSF: Array, more: None) -> Array:
        del layer, more
        return (a_WSF != 0).sum((0, 1), dtype=jnp.int32)

    return _layers(params, encoder, batch, None, each)
