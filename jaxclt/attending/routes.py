"""What a small change of one source does to one row through the heads' patterns.

The query and key parts of an edge by response (maths 22.4), by head. What the source
brings to queries and keys comes up through the frozen stream; what a change of those
does to the row, everything above live, comes down; they meet in every head (maths
22.82).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.attending.clean import Clean, make_clean
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.columns import Columns
from jaxclt.graph.live import Live, live_way
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.stream import Stream, make_stream
from jaxclt.graph.travel import Writes, descend, push
from jaxclt.precision import jit

__all__ = ["head_routes"]


def head_routes(
    p: Recorded, row: RowTargets, column: int, *, past_norm: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Response of a row to a source through every head's queries and keys, [L, H] each.

    Args:
      p: the prompt; its active features are the graph's.
      row: one target, with all that it reads when norms and gates answer summed.
      column: of the source.
      past_norm: whether the dictionary reads past the norm before the MLP.
    """
    writes = Columns(p).writes(np.array([column]), 1, 0)
    T, clean = len(p.recording.token_T), make_clean(p)
    x_LTD = _pushed(make_stream(p, pull=False), writes, n_positions=T)
    way = live_way(p, past_norm=past_norm)
    at = np.int32(row.layer_R[0]), np.int32(row.pos_R[0])
    found = _meet(way, clean, x_LTD, *at, jnp.asarray(row.read_RD[0]))
    return tuple(map(np.asarray, found))  # pyright: ignore


@partial(jit, static_argnames="n_positions")
def _pushed(stream: Stream, writes: Writes, *, n_positions: int) -> Array:
    """What a source brings to the stream that enters each layer, [L, T, D]."""

    def keep(layer: Array, x_P1D: Array, _: Array, __: Array, x_LPD: Array) -> Array:
        return x_LPD.at[layer].set(x_P1D[:, 0])

    L, (_, _, D) = stream.cfg.n_layers, writes.write_MBD.shape
    none_LPD = jnp.zeros((L, n_positions, D), writes.write_MBD.dtype)
    return push(stream, writes, keep, none_LPD, n_positions=n_positions, end=L)[1]


@jit
def _meet(
    way: Live, clean: Clean, x_LTD: Array, layer: Array, pos: Array, read_D: Array
) -> tuple[Array, Array]:
    (L, T, D), H = x_LTD.shape, way.cfg.n_heads

    def add_reads(g_T1D: Array, here: Array | int) -> Array:
        return g_T1D.at[pos, 0].add(jnp.where(layer == here, read_D, 0))

    def visit(here: Array, g_T1D: Array, state: Any) -> Any:
        _, moved_T1D = way.past_mlp(here, g_T1D, partial(add_reads, here=here))
        pulled = way.attention.by_head(here, moved_T1D)
        at, x_TD = clean.layer(here), x_LTD[here]
        brought = zip(at.heads(x_TD), at.heads(jnp.zeros_like(x_TD)), strict=True)
        parts = []
        for g_T1HC, (x_TXC, zero_TXC) in zip(pulled, brought, strict=True):
            x_THC = jnp.repeat(x_TXC - zero_TXC, H // x_TXC.shape[1], axis=1)
            parts.append(jnp.einsum("THC,THC->H", g_T1HC[:, 0], x_THC))
        return tuple(
            all_LH.at[here].set(mine_H)
            for all_LH, mine_H in zip(state, parts, strict=True)
        )

    none_LH = jnp.zeros((L, H), x_LTD.dtype)
    top_T1D = add_reads(jnp.zeros((T, 1, D), x_LTD.dtype), L)
    top = jnp.minimum(layer, L - 1)
    return descend(way, top_T1D, top, add_reads, visit, (none_LH, none_LH))[1]
