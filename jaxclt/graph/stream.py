"""The frozen stream on the device, laid out for one direction of travel.

Edges need the frozen attention maps many times, and nothing else of the model. Gains
and norm denominators are folded into the value maps and the patterns once, and the
projections are stored so that every product has its contracted axis first on the right,
which is what matmul kernels want: a pull-back multiplies by the transposes.

Attention patterns are kept, or, where they would not fit, computed again in each layer
from what entered it; next to moving a chunk of vectors that costs little.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclt.lm.block import frozen_pattern
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import fold_post_attn
from jaxclt.lm.layers import attn_norm, fold_norm
from jaxclt.types import Block, Held, LMParams, Recording

__all__ = ["Stream", "attend", "causal_share", "make_stream", "on_mesh"]


class Stream(NamedTuple):
    """Frozen attention of all layers; axes as in `jaxclt.types`, J heads per group."""

    value: Array  # push: [L, D, G, C]; pull: [L, G, C, D]
    output: Array  # push: [L, G, J, C, D]; pull: [L, D, G, J, C]
    pattern_LHTS: Array | None  # times the norm's scale at S, and that behind it at T
    blocks: Block | None  # what computes a pattern that is not kept
    clean_LTD: Array | None
    scale_LT: Array
    post_scale_LT: Array | None  # of a norm behind the attention
    skip: tuple[Array, Array] | None


def make_stream(
    params: LMParams,
    recording: Recording,
    *,
    cfg: LMConfig,
    pull: bool,
    skip: tuple[Array | np.ndarray, Array | np.ndarray] | None = None,
) -> Stream:
    """Put what moves vectors between positions on the device, once per prompt.

    Args:
      params: model weights.
      recording: the clean pass.
      cfg: model shape.
      pull: laid out for pulling targets back, else for pushing sources forward.
      skip: linear path of the dictionary, see `jaxclt.lm.frozen.replay`.
    """
    frozen = recording.frozen
    kept = frozen.pattern_LHTS is not None
    return _lay_out(
        params.blocks,
        frozen.pattern_LHTS,
        None if kept else frozen.clean_LTD,
        frozen.attn_scale_LT,
        frozen.post_attn_scale_LT,
        None if skip is None else (jnp.asarray(skip[0]), jnp.asarray(skip[1])),
        cfg=cfg,
        pull=pull,
    )


def _lay_out(
    blocks: Block,
    pattern_LHTS: Array | None,
    clean_LTD: Array | None,
    scale_LT: Array,
    post_scale_LT: Array | None,
    skip: tuple[Array, Array] | None,
    *,
    cfg: LMConfig,
    pull: bool,
) -> Stream:
    folded, pattern_LHTS = fold_post_attn(blocks, pattern_LHTS, post_scale_LT)
    value, output = _fold(folded, cfg=cfg, pull=pull)
    return Stream(
        value=value,
        output=output,
        pattern_LHTS=None if pattern_LHTS is None else _scaled(pattern_LHTS, scale_LT),
        blocks=None if clean_LTD is None else _for_patterns(blocks),
        clean_LTD=clean_LTD,
        scale_LT=scale_LT,
        post_scale_LT=post_scale_LT,
        skip=skip,
    )


def _for_patterns(blocks: Block) -> Block:
    """What computes patterns: every device that works on edges holds it."""
    none_L = blocks.norm_attn_LD[:, 0]
    unused = dict.fromkeys(("v_LDGC", "o_LHCD", "up_LDI", "down_LID"), none_L)
    return dataclasses.replace(
        blocks,
        **unused,
        gate_LDI=None,
        v_bias_LGC=None,
        o_bias_LD=None,
        gate_bias_LI=None,
        up_bias_LI=None,
        down_bias_LD=None,
    )


def on_mesh(held: Any, mesh: Mesh) -> Any:
    """A pytree whole on every device of a mesh, wherever its arrays were.

    What of a model's weights edges need (attention's values and outputs) is little; a
    model that is split over devices is so no more for them.
    """
    there = set(mesh.devices.flat)
    leaves = jax.tree.leaves(held)
    if mesh.size == 1 and all(leaf.devices() == there for leaf in leaves):
        return held
    return jax.device_put(held, NamedSharding(mesh, PartitionSpec()))


@jax.jit
def _scaled(pattern_LHTS: Array, scale_LT: Array) -> Array:
    return pattern_LHTS * scale_LT[:, None, None, :]


@partial(jax.jit, static_argnames=("cfg", "pull"))
def _fold(blocks: Block, *, cfg: LMConfig, pull: bool) -> tuple[Array, Array]:
    L, _, C, D = blocks.o_LHCD.shape
    value_LGCD = jax.vmap(fold_norm)(
        blocks.v_LDGC.transpose(0, 2, 3, 1), attn_norm(blocks)
    )
    output_LGJCD = blocks.o_LHCD.reshape(L, cfg.n_kv_heads, -1, C, D)
    if pull:
        return value_LGCD, output_LGJCD.transpose(0, 4, 1, 2, 3)
    return value_LGCD.transpose(0, 3, 1, 2), output_LGJCD


def attend(
    stream: Stream,
    layer: Array,
    x_PBD: Array,
    *,
    cfg: LMConfig,
    start: Array | int,
    pull: bool,
) -> Array:
    """What frozen attention of one layer adds to streams [P, B, D]; linear in them.

    Args:
      stream: laid out for `pull` or not.
      layer: which layer.
      x_PBD: streams at positions from `start` on.
      cfg: model shape.
      start: first position; nothing before it is read.
      pull: which layout `stream` has. The map is the same.
    """
    P = x_PBD.shape[0]
    pattern_GJTS = _pattern(stream, layer, cfg, start, P)
    value, output = stream.value[layer], stream.output[layer]
    to_value = "SBD,GCD->SBGC" if pull else "SBD,DGC->SBGC"
    from_heads = "TBGJC,DGJC->TBD" if pull else "TBGJC,GJCD->TBD"
    v_SBGC = jnp.einsum(to_value, x_PBD, value)
    # One plain matmul per group: a batched one first moves its operands to G-major.
    moved = [
        _moved(pattern_JTS, v_SB1C[:, :, 0])
        for pattern_JTS, v_SB1C in zip(
            pattern_GJTS, jnp.split(v_SBGC, cfg.n_kv_heads, axis=2), strict=True
        )
    ]
    return jnp.einsum(from_heads, jnp.stack(moved, axis=2), output)


_BLOCK = 256  # positions; smaller matmuls would run slower than they save


def _ends(P: int) -> list[int]:
    """Where blocks of so many positions end."""
    n = max(P // _BLOCK, 1)
    return [P * (i + 1) // n for i in range(n)]


def causal_share(P: int) -> float:
    """Share of a full pattern of P positions that `attend` multiplies with."""
    ends = _ends(P)
    starts = [0, *ends[:-1]]
    return sum((b - a) * b for a, b in zip(starts, ends, strict=True)) / P**2


def _moved(pattern_JTS: Array, v_SBC: Array) -> Array:
    """Values through a causal pattern [T, B, J, C], mostly without its zero half."""
    ends = _ends(len(v_SBC))
    blocks = [
        jnp.einsum("JTS,SBC->TBJC", pattern_JTS[:, a:b, :b], v_SBC[:b])
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return jnp.concatenate(blocks)


def _pattern(
    stream: Stream, layer: Array, cfg: LMConfig, start: Array | int, P: int
) -> Array:
    """Pattern times scale [G, J, P, P] of positions from `start` on."""
    if stream.pattern_LHTS is not None:
        first = jnp.asarray(start, layer.dtype)
        at = (layer, jnp.zeros((), layer.dtype), first, first)
        size = (1, cfg.n_heads, P, P)
        pattern_HTS = jax.lax.dynamic_slice(stream.pattern_LHTS, at, size)[0]
    else:
        if stream.blocks is None or stream.clean_LTD is None or start != 0:
            raise ValueError("patterns of later positions need the earlier ones")
        p = jax.tree.map(lambda leaf: leaf[layer], stream.blocks)
        clean_TD, scale_T = stream.clean_LTD[layer, :P], stream.scale_LT[layer, :P]
        frozen = Held(attn_scale_LT=scale_T, clean_LTD=clean_TD)
        pattern_HTS = frozen_pattern(p, frozen, cfg=cfg)
        assert pattern_HTS is not None, "the clean stream is there"
        pattern_HTS = pattern_HTS * scale_T[None, None, :]
        if stream.post_scale_LT is not None:
            pattern_HTS = pattern_HTS * stream.post_scale_LT[layer, None, :P, None]
    return pattern_HTS.reshape(cfg.n_kv_heads, -1, P, P)
