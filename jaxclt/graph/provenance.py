"""How an edge travelled: straight up the residual stream, or moved by which heads.

The frozen stream is a polynomial in one gate per attention head, so an edge splits
exactly, without enumerating paths (maths 7.1):

    A = A0 + A1 + ... + AL                     by the number of heads passed
    A = A0 + sum over (l, h) of load(l, h)     by the last head before the target
    A = bypass(l) + sum over h of through(l, h)           by what happens at a layer l

A0 is the residual-direct part of Circuit Tracing (2025), section 4; the rest is
attention-mediated. A dictionary's skip is part of the residual stream here.

Here are the first and the last; they are pulled back like plain rows, with one more
axis Q for the state of a path. `jaxclt.graph.heads` has the second. Further axes: B
rows treated together. Columns are those of `jaxclt.graph.graph.Graph`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.sparse import csr_array

from jaxclt.clt.active import Active
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.graph import Graph
from jaxclt.graph.layout import Layout
from jaxclt.graph.target_reads import target_reads
from jaxclt.lm.block import frozen_pattern
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import fold_post_attn, frozen_attention
from jaxclt.types import Block, Frozen, Held, LMParams, Recording

__all__ = [
    "FrozenStream",
    "crop",
    "direct_edges",
    "frozen_stream",
    "graph_active",
    "graph_rows",
    "hop_spectrum",
    "layer_cut",
    "layer_pattern",
    "residual_reads",
]

_CHUNK_BYTES = 2**28  # of the cotangents held at once


def crop(
    recording: Recording, active: Active, n_tokens: int
) -> tuple[Recording, Active]:
    """A padded recording without its padding; everything else here expects that."""
    n, frozen = n_tokens, recording.frozen
    pattern_LHTS = frozen.pattern_LHTS

    def start(x_LT: Array | None) -> Array | None:
        return None if x_LT is None else x_LT[:, :n]

    cropped = Recording(
        token_T=recording.token_T[:n],
        embed_TD=recording.embed_TD[:n],
        resid_LTD=recording.resid_LTD[:, :n],
        mid_LTD=recording.mid_LTD[:, :n],
        write_LTD=recording.write_LTD[:, :n],
        out_TD=recording.out_TD[:n],
        frozen=Frozen(
            pattern_LHTS=None if pattern_LHTS is None else pattern_LHTS[:, :, :n, :n],
            attn_scale_LT=frozen.attn_scale_LT[:, :n],
            mlp_scale_LT=frozen.mlp_scale_LT[:, :n],
            out_scale_T=frozen.out_scale_T[:n],
            clean_LTD=start(frozen.clean_LTD),
            post_attn_scale_LT=start(frozen.post_attn_scale_LT),
            post_mlp_scale_LT=start(frozen.post_mlp_scale_LT),
        ),
    )
    active = dataclasses.replace(
        active.where(active.pos_A < n), scale_LT=active.scale_LT[:, :n]
    )
    return cropped, active


def graph_active(graph: Graph, active: Active) -> Active:
    """The active features that are nodes of a graph, in its order."""

    def key(a: Graph | Active) -> np.ndarray:
        place = a.layer_A.astype(np.int64) * graph.n_tokens + a.pos_A
        return (place << 32) + a.feature_A

    return active.where(np.isin(key(active), key(graph)))


def graph_rows(
    params: LMParams, recording: Recording, active: Active, vec_KD: np.ndarray | Array
) -> RowTargets:
    """What all rows of a graph read: its features, then its targets."""
    K, L, T = len(vec_KD), *recording.mid_LTD.shape[:2]
    target_KD = target_reads(params, recording, vec_KD, T - 1)
    return RowTargets(
        layer_R=np.concatenate([active.layer_A, np.full(K, L, np.int32)]),
        pos_R=np.concatenate([active.pos_A, np.full(K, T - 1, np.int32)]),
        read_RD=np.concatenate([active.reads(), target_KD]),
    )


# -- the residual stream alone ---------------------------------------------------------


def residual_reads(
    active: Active, rows: RowTargets
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Downwards without attention: (layer, what rows read of its write, of its mid)."""
    mid_RD = np.zeros_like(rows.read_RD)
    mid_RD[rows.layer_R == active.n_layers] = rows.read_RD[
        rows.layer_R == active.n_layers
    ]
    for layer in reversed(range(active.n_layers)):
        write_RD, mid_RD = mid_RD, mid_RD.copy()
        if active.skip_LDD is not None:
            scale_R = active.scale_LT[layer, rows.pos_R]
            mid_RD += (write_RD @ active.skip_LDD[layer].T) * scale_R[:, None]
        here = rows.layer_R == layer
        mid_RD[here] = rows.read_RD[here]
        yield layer, write_RD, mid_RD


def _written(active: Active, layer: int, pos: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that write one MLP output: their columns, value x decoder row."""
    columns, vectors = [np.zeros(0, np.int64)], [active.write_bias_LD[:0]]
    for source in range(layer + 1):
        if layer - source >= active.decoder[source].shape[1]:
            continue
        slots = active.of_layer(source)
        lo, hi = np.searchsorted(active.pos_A[slots], [pos, pos + 1])
        columns.append(np.arange(slots.start + lo, slots.start + hi))
        row_AD = active.decoder[source][active.row_A[columns[-1]], layer - source]
        vectors.append(active.value_A[columns[-1], None] * row_AD)
    return np.concatenate(columns), np.concatenate(vectors)


def direct_edges(
    active: Active, error_LTD: np.ndarray, embed_TD: np.ndarray, rows: RowTargets
) -> csr_array:
    """The residual-direct part of every edge, [R, N]: all attention heads off.

    Closed form: value x <decoder writes below the target's layer, target's read>, zero
    between positions, hence sparse. The columns of a position are pushed up the
    residual stream together and read by the rows of every layer: about 1 / (L T) of the
    work of the dot products of plain attribution.

    Args:
      active: the source features.
      error_LTD: error vectors.
      embed_TD: embedding vectors.
      rows: the targets.
    """
    (L, T, _), R = error_LTD.shape, len(rows.pos_R)
    layout = Layout(n_features=len(active.layer_A), n_layers=L, n_tokens=T)
    blocks = [_direct_block(active, error_LTD, embed_TD, rows, p) for p in range(T)]
    n_R = np.zeros(R, np.int64)
    for row, col, _ in blocks:
        n_R[row] = len(col)
    start_R = np.concatenate([[0], np.cumsum(n_R)])
    index = np.zeros(start_R[-1], np.int32)
    data = np.zeros(start_R[-1], rows.read_RD.dtype)
    for row, col, edge_RN in blocks:
        place = start_R[row][:, None] + np.arange(len(col))
        index[place], data[place] = col[None, :], edge_RN
    found = csr_array((data, index, start_R), shape=(R, layout.n_columns))
    found.eliminate_zeros()
    return found


def _direct_block(
    active: Active,
    error_LTD: np.ndarray,
    embed_TD: np.ndarray,
    rows: RowTargets,
    pos: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns of one position, and the direct edges between them."""
    L, T, _ = error_LTD.shape
    layout = Layout(n_features=len(active.layer_A), n_layers=L, n_tokens=T)
    row = np.flatnonzero(rows.pos_R == pos)
    feature = np.flatnonzero(active.pos_A == pos)
    errors = layout.at("error", np.arange(L), pos)
    col = np.concatenate([feature, errors, [layout.at("embed", pos)]])
    first_L = np.searchsorted(active.layer_A[feature], np.arange(L + 1))
    # What the columns hold of the residual stream on the way up.
    state_ND = np.zeros((len(col), embed_TD.shape[1]), rows.read_RD.dtype)
    state_ND[-1] = embed_TD[pos]
    edge_RN = np.zeros((len(row), len(col)), rows.read_RD.dtype)
    for layer in range(L + 1):
        # Features are ordered by layer: none above has written anything yet.
        has = np.r_[0 : first_L[layer], len(feature) : len(feature) + layer, -1]
        here = np.flatnonzero(rows.layer_R[row] == layer)
        if len(here):
            read_RD = rows.read_RD[row[here]]
            edge_RN[np.ix_(here, has)] = read_RD @ state_ND[has].T
        if layer == L:
            break
        if active.skip_LDD is not None:
            read_ND = state_ND[has] * active.scale_LT[layer, pos]
            state_ND[has] += read_ND @ active.skip_LDD[layer]
        for source in np.unique(active.layer_A[feature[: first_L[layer + 1]]]):
            if layer - source >= active.decoder[source].shape[1]:
                continue
            own = slice(first_L[source], first_L[source + 1])
            slot = feature[own]
            row_AD = active.decoder[source][active.row_A[slot], layer - source]
            state_ND[own] += active.value_A[slot, None] * row_AD
        state_ND[len(feature) + layer] += error_LTD[layer, pos]
    return row, col, edge_RN


# -- whole rows, by the state of the path ----------------------------------------------


class FrozenStream(NamedTuple):
    """The frozen stream on the device; a norm behind the attention is folded in.

    Scanned over it is one layer, without the leading L.
    """

    blocks: Block
    pattern_LHTS: Array | None
    scale_LT: Array
    skip: tuple[Array, Array] | None
    clean_LTD: Array | None  # instead of patterns that are not kept
    post_scale_LT: Array | None  # for these: of the norm behind the attention


def frozen_stream(
    params: LMParams, recording: Recording, active: Active
) -> FrozenStream:
    """Everything of a recorded prompt that moves what sources write."""
    frozen = recording.frozen
    blocks, pattern_LHTS = fold_post_attn(
        params.blocks, frozen.pattern_LHTS, frozen.post_attn_scale_LT
    )
    again = pattern_LHTS is None
    return FrozenStream(
        blocks,
        pattern_LHTS,
        frozen.attn_scale_LT,
        active.skip,
        clean_LTD=frozen.clean_LTD if again else None,
        post_scale_LT=frozen.post_attn_scale_LT if again else None,
    )


def layer_pattern(layer: FrozenStream, *, cfg: LMConfig) -> Array:
    """One layer's attention pattern [H, T, S], kept or computed again."""
    scale_T, post_T = layer.scale_LT, layer.post_scale_LT
    held = Held(
        pattern_LHTS=layer.pattern_LHTS,
        attn_scale_LT=scale_T,
        clean_LTD=layer.clean_LTD,
    )
    pattern_HTS = frozen_pattern(layer.blocks, held, cfg=cfg)
    assert pattern_HTS is not None, "a recording has patterns or the clean stream"
    return pattern_HTS if post_T is None else pattern_HTS * post_T[None, :, None]


class _States(NamedTuple):
    """How a path, followed downwards, changes its state when a head moves it."""

    into_LQQ: np.ndarray  # [l, from, to]
    gate_LQH: np.ndarray  # heads of layer l that lead into a state


@partial(jax.jit, static_argnames="cfg")
def _pull_states(
    stream: FrozenStream,
    states: _States,
    layer_B: Array,
    pos_B: Array,
    read_BD: Array,
    *,
    cfg: LMConfig,
) -> tuple[Array, Array]:
    """Cotangents by state at all MLP outputs [L, T, Q, B, D] and at the embeddings."""
    T, Q = stream.scale_LT.shape[1], states.into_LQQ.shape[1]

    def inject(g_TQBD: Array, layer: Array | int) -> Array:
        here_BD = jnp.where(
            (layer_B == layer)[:, None], read_BD, jnp.zeros_like(read_BD)
        )
        return g_TQBD.at[pos_B, 0, jnp.arange(len(pos_B))].add(here_BD)

    def level(g_TQBD: Array, x: tuple) -> tuple[Array, Array]:
        layer, one, (into_QQ, gate_QH) = x
        p, scale_T, skip = one.blocks, one.scale_LT, one.skip
        pattern_HTS = layer_pattern(one, cfg=cfg)
        write_TQBD = g_TQBD
        if skip is not None:
            back_TQBD = jnp.einsum("TQBE,DE->TQBD", g_TQBD, skip[1])
            g_TQBD = g_TQBD + back_TQBD * skip[0][:, None, None, None]
        g_TQBD = inject(g_TQBD, layer)
        behind_TQBD = write_TQBD if cfg.parallel else g_TQBD

        def pull(g_TBD: Array, gate_H: Array) -> Array:
            gated_HTS = pattern_HTS * gate_H[:, None, None]
            attention = partial(frozen_attention, p, gated_HTS, scale_T, cfg=cfg)
            _, back = jax.vjp(jax.vmap(attention, in_axes=1, out_axes=1), g_TBD)
            return back(g_TBD)[0]

        moved_TQBD = jnp.einsum("TqBD,qQ->TQBD", behind_TQBD, into_QQ)
        pulled_TQBD = jax.vmap(pull, (1, 0), 1)(moved_TQBD, gate_QH)
        return g_TQBD + pulled_TQBD, write_TQBD

    g_TQBD = jnp.zeros((T, Q, *read_BD.shape), read_BD.dtype)
    xs = (jnp.arange(cfg.n_layers, dtype=layer_B.dtype), stream, states)
    embed_TQBD, write_LTQBD = jax.lax.scan(
        level, inject(g_TQBD, cfg.n_layers), xs, reverse=True
    )
    return write_LTQBD, embed_TQBD


def _state_edges(
    params: LMParams,
    recording: Recording,
    active: Active,
    error_LTD: np.ndarray,
    rows: RowTargets,
    states: _States,
    cfg: LMConfig,
) -> np.ndarray:
    """Rows [Q, R, N] by the state in which their paths arrive at the source."""
    L, T, D = error_LTD.shape
    R, Q = len(rows.pos_R), states.into_LQQ.shape[1]
    layout = Layout(n_features=len(active.layer_A), n_layers=L, n_tokens=T)
    dtype = rows.read_RD.dtype
    embed_TD = np.asarray(recording.embed_TD)
    stream = frozen_stream(params, recording, active)
    states = _States(*(part.astype(dtype) for part in states))
    edge_QRN = np.zeros((Q, R, layout.n_columns), dtype)
    n = max(1, min(R, _CHUNK_BYTES // (L * T * Q * D * dtype.itemsize)))
    for start in range(0, R, n):
        row = np.arange(start, min(start + n, R))
        part, pad = rows.take(row), (0, n - len(row))
        with jax.default_matmul_precision("highest"):
            write, embed = _pull_states(
                stream,
                states,
                np.pad(part.layer_R, pad, constant_values=-1),
                np.pad(part.pos_R, pad),
                np.pad(part.read_RD, (pad, (0, 0))),
                cfg=cfg,
            )
        write_LTQBD, embed_TQBD = np.asarray(write), np.asarray(embed)
        chunk_QBN = np.zeros((Q, n, edge_QRN.shape[2]), dtype)
        for layer, pos in np.ndindex(L, T):
            col, vector_AD = _written(active, layer, pos)
            g_QBD = write_LTQBD[layer, pos]
            chunk_QBN[:, :, col] += g_QBD @ vector_AD.T
            chunk_QBN[:, :, layout.at("error", layer, pos)] = (
                g_QBD @ error_LTD[layer, pos]
            )
        for pos in range(T):
            chunk_QBN[:, :, layout.at("embed", pos)] = embed_TQBD[pos] @ embed_TD[pos]
        edge_QRN[:, row] = chunk_QBN[:, : len(row)]
    return edge_QRN


def hop_spectrum(
    params: LMParams,
    recording: Recording,
    active: Active,
    error_LTD: np.ndarray,
    rows: RowTargets,
    *,
    cfg: LMConfig,
    max_hops: int = 3,
) -> np.ndarray:
    """Rows by the number of heads passed, [max_hops + 1, R, N]; they sum to the rows.

    Entry k holds the paths with k hops, the last one all with `max_hops` or more.
    Costs max_hops + 1 plain attributions of the rows.
    """
    H, Q = cfg.n_heads, max_hops + 1
    into_QQ = np.eye(Q, k=1)
    into_QQ[-1, -1] = 1
    states = _States(
        np.repeat(into_QQ[None], cfg.n_layers, 0), np.ones((cfg.n_layers, Q, H))
    )
    return _state_edges(params, recording, active, error_LTD, rows, states, cfg)


def layer_cut(
    params: LMParams,
    recording: Recording,
    active: Active,
    error_LTD: np.ndarray,
    rows: RowTargets,
    *,
    cfg: LMConfig,
    layer: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows by what happens at one layer: bypass [R, N] and through each head [H, R, N].

    They sum to the rows, for every layer. Costs H + 1 plain attributions of the rows.
    """
    H = cfg.n_heads
    into_LQQ = np.repeat(np.eye(H + 1)[None], cfg.n_layers, 0)
    gate_LQH = np.ones((cfg.n_layers, H + 1, H))
    into_LQQ[layer] = 0
    into_LQQ[layer, 0, 1:] = 1
    gate_LQH[layer, 1:] = np.eye(H)
    states = _States(into_LQQ, gate_LQH)
    edge = _state_edges(params, recording, active, error_LTD, rows, states, cfg)
    return edge[0], edge[1:]
