"""Global weights of one attention head: features feeding later positions through it.

A path that passes exactly one head h of layer l: a source below l writes to the stream
at position c', the head moves it to c, and a target of layer l or above reads it there
(above, where attention and MLP stand side by side).

    V_h[t, s] = <sum of s's decoders below l -> gain, W_V, W_O of h, t's encoder>
    ind_h[t, s] = sum over c of  1(a_t(c)) q_t(c) m_s(c)
    m_s(c) = sum over c' of  A_h(c, c') q_h(c') a_s(c')

with q the reciprocal norm denominators before the head (and behind it, at c, where the
model has a norm there), and before the target's encoder where it reads after the norm:
n ERA = V_h ind_h is then exactly the sum over graphs of the edges' one-hop parts (maths
7.3, 17.10). There is no version without q here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.coder import Bound
from jaxclt.global_weights.weights import folded_encoder, summed_writes
from jaxclt.lm.block import frozen_pattern
from jaxclt.lm.config import LMConfig
from jaxclt.lm.layers import attn_norm, fold_norm
from jaxclt.types import Block, Held

__all__ = ["Head", "head_block", "head_sums", "rows_by_layer"]

Head = tuple[int, int]  # layer, head


def head_sums(
    blocks: Block,
    a_UT: Array,
    resid_LWSD: Array,
    attn_scale_LWS: Array,
    post_scale_LWS: Array | None,
    scale_LT: Array,
    *,
    cfg: LMConfig,
    starts: Sequence[int],
    heads: Sequence[Head],
    scaled: bool,
) -> dict[str, Any]:
    """``head_ind`` and ``head_act``, one matrix [targets, sources] for each head.

    Targets are the features from the head's layer on, sources those below it.

    Args:
      blocks: weights of the model.
      a_UT: activations, zero where a position does not count.
      resid_LWSD: streams entering the layers.
      attn_scale_LWS: reciprocal denominators before attention.
      post_scale_LWS: those behind it, if there is a norm.
      scale_LT: those before the MLPs.
      cfg: model shape.
      starts: where layers start among the features.
      heads: which.
      scaled: whether encoders read after the norm.
    """
    _, W, S, _ = resid_LWSD.shape
    a_UWS = a_UT.reshape(-1, W, S)
    found: dict[str, list[Array]] = {"head_ind": [], "head_act": []}
    pattern: dict[int, Array] = {}
    for layer, head in heads:
        if layer not in pattern:
            pattern[layer] = _pattern(
                blocks, layer, resid_LWSD[layer], attn_scale_LWS[layer], cfg
            )
        pattern_WTS = pattern[layer][:, head] * attn_scale_LWS[layer][:, None, :]
        if post_scale_LWS is not None:
            pattern_WTS = pattern_WTS * post_scale_LWS[layer][:, :, None]
        moved_UWS = jnp.einsum("WTS,UWS->UWT", pattern_WTS, a_UWS[: starts[layer]])
        moved_UT = moved_UWS.reshape(-1, W * S)
        target_UT = a_UT[starts[layer] :]
        on_UT = (target_UT != 0).astype(a_UT.dtype)
        if scaled:
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


def _pattern(
    blocks: Block, layer: int, resid_WSD: Array, scale_WS: Array, cfg: LMConfig
) -> Array:
    """Attention probabilities [W, H, T, S] of one layer."""
    p = jax.tree.map(lambda leaf: leaf[layer], blocks)

    def one(resid_SD: Array, scale_S: Array) -> Array:
        held = Held(attn_scale_LT=scale_S, clean_LTD=resid_SD)
        found = frozen_pattern(p, held, cfg=cfg)
        assert found is not None, "it is computed from the stream"
        return found

    return jax.vmap(one)(resid_WSD, scale_WS)


@jax.jit
def _through(read_RD: Array, write_ND: Array, value_DC: Array, out_CD: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return read_RD @ ((write_ND @ value_DC) @ out_CD).T


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
    p = on.params.blocks
    value_DC = p.v_LDGC[layer, :, h // cfg.n_queries_per_kv]
    value_DC = fold_norm(value_DC.T, attn_norm(p).of_layer(layer)).T
    out_CD = p.o_LHCD[layer, h]
    if p.post_attn_LD is not None:
        out_CD = out_CD * p.post_attn_LD[layer][None, :]
    read_RD = folded_encoder(on, to, feature_R)
    write_ND = summed_writes(on, of, layer, feature_N)
    return np.asarray(_through(jnp.asarray(read_RD), write_ND, value_DC, out_CD))
