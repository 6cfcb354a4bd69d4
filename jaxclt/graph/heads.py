"""Chosen edges by the last head that moved them, for a whole pruned graph at once.

    A = A0 + sum over (l, h) of load(l, h)

load(l, h) holds the paths whose last hop before the target is head h of layer l (maths
7.4). Sources are pushed forward once, which makes every last head of every target
readable on the way; pulling targets back would take one pass per target and head.

Columns are pushed from the first of their layers, and no earlier than the first of
their positions. Shapes depend on the padded length and the bucketed number of rows
only, so that similar prompts share their programs.

Axes besides the usual: E edges, J heads of an edge, X all heads of some layers, B
columns pushed together, W positions of a window. Columns are those of
`jaxclt.graph.graph.Graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from jaxclt.graph.head_table import HeadLoads
from jaxclt.graph.layout import Layout
from jaxclt.graph.provenance import (
    FrozenStream,
    direct_edges,
    frozen_stream,
    layer_pattern,
    residual_reads,
)
from jaxclt.graph.shares import edge_influence
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.shapes import bucket
from jaxclt.types import Block, LMParams, Recording

__all__ = ["head_loadings", "strongest_kept"]

_TOKENS = 256  # columns times positions pushed together
_WINDOWS = 6  # sizes of the windows, a program to compile each
_FLOPS_WORTH_WINDOWS = 2e10  # below this, one window is cheaper than more programs
_EDGES = 2048  # edges read off together


class _Chunk(NamedTuple):
    """Columns pushed together over the last positions of a prompt."""

    col_B: np.ndarray
    width: int  # W, positions of the window
    start: int  # its first position
    capacity: int  # B


class _Pushed(NamedTuple):
    """What the columns of a chunk write, padded to its capacity."""

    pos_B: np.ndarray  # within the window
    embed_BD: np.ndarray
    write_LBD: np.ndarray
    start: np.ndarray  # int32, of the window
    first: np.ndarray  # int32, lowest layer with a write
    last: np.ndarray  # int32, highest layer read


@partial(jax.jit, static_argnames=("cfg", "width"))
def _push(stream: FrozenStream, x: _Pushed, *, cfg: LMConfig, width: int) -> Array:
    """What all heads move, before their output maps: [L, W, H, B, C]."""
    H, W = cfg.n_heads, width
    B, D = x.embed_BD.shape
    L = cfg.n_layers
    source_B = jnp.arange(B)

    def window(leaf: Array, axes: tuple[int, ...]) -> Array:
        for axis in axes:
            leaf = jax.lax.dynamic_slice_in_dim(leaf, x.start, W, axis)
        return leaf

    def mix(p: Block, pattern_HTS: Array, scale_T: Array, resid_WBD: Array) -> Array:
        """Values through the pattern: see `layers.move`."""
        normalise = partial(layers.normalise, biases=False)
        normalise = jax.vmap(normalise, (1, None, None), 1)
        normed_WBD = normalise(resid_WBD, scale_T, layers.attn_norm(p))
        v_WBGC = jnp.einsum("WBD,DGC->WBGC", normed_WBD, p.v_LDGC)
        pattern_GJTS = pattern_HTS.reshape(cfg.n_kv_heads, -1, W, W)
        mixed_TGJBC = jnp.einsum("GJTS,SBGC->TGJBC", pattern_GJTS, v_WBGC)
        return mixed_TGJBC.reshape(W, H, B, cfg.d_head)

    def level(layer: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        resid_WBD, mixed_LWHBC = state
        one: FrozenStream = jax.tree.map(lambda leaf: leaf[layer], stream)
        p, scale_T, skip = one.blocks, one.scale_LT, one.skip
        pattern_HTS = window(layer_pattern(one, cfg=cfg), (1, 2))
        mixed_WHBC = mix(p, pattern_HTS, window(scale_T, (0,)), resid_WBD)
        mixed_LWHBC = mixed_LWHBC.at[layer].set(mixed_WHBC)
        before_WBD = resid_WBD
        resid_WBD = resid_WBD + jnp.einsum("WHBC,HCD->WBD", mixed_WHBC, p.o_LHCD)
        if skip is not None:
            mid_WBD = before_WBD if cfg.parallel else resid_WBD
            read_WBD = mid_WBD * window(skip[0], (0,))[:, None, None]
            resid_WBD = resid_WBD + jnp.einsum("WBD,DE->WBE", read_WBD, skip[1])
        write_BD = jnp.asarray(x.write_LBD)[layer]
        resid_WBD = resid_WBD.at[x.pos_B, source_B].add(write_BD)
        return resid_WBD, mixed_LWHBC

    dtype = x.embed_BD.dtype
    resid_WBD = jnp.zeros((W, B, D), dtype).at[x.pos_B, source_B].set(x.embed_BD)
    mixed_LWHBC = jnp.zeros((L, W, H, B, cfg.d_head), dtype)
    done = jax.lax.fori_loop(x.first, x.last + 1, level, (resid_WBD, mixed_LWHBC))
    return done[1]


class _Sources(NamedTuple):
    """All columns: what they write, and where (embeddings at layer -1)."""

    active: Active
    error_LTD: np.ndarray
    embed_TD: np.ndarray
    layer_N: np.ndarray
    pos_N: np.ndarray


def _sources(active: Active, error_LTD: np.ndarray, embed_TD: np.ndarray) -> _Sources:
    L, T, _ = error_LTD.shape
    layout = Layout(n_features=len(active.layer_A), n_layers=L, n_tokens=T)
    places = layout.places(active.layer_A, active.pos_A)
    return _Sources(active, error_LTD, embed_TD, *places)


def _chunks(col: np.ndarray, sources: _Sources, padded: int, flops: float) -> Iterator:
    """Chunks of the distinct columns: by window, then late layers first.

    Args:
      col: columns to push, each once.
      sources: all columns.
      padded: length of the recording, on which the sizes of the windows depend.
      flops: of a column at one position.
    """
    T = len(sources.embed_TD)
    few = len(col) * flops * T / 2 < _FLOPS_WORTH_WINDOWS
    n = 1 if few else min(_WINDOWS, padded)
    sizes = [-(-padded * (i + 1) // n) for i in range(n)]
    size = np.searchsorted(sizes, T - sources.pos_N[col])
    for i, width in enumerate(sizes):
        mine = col[size == i]
        mine = mine[np.argsort(-sources.layer_N[mine], kind="stable")]
        capacity = max(1, _TOKENS // width)
        for at in range(0, len(mine), capacity):
            col_B = mine[at : at + capacity]
            yield _Chunk(col_B, width, max(T - width, 0), capacity)


def _pushed(chunk: _Chunk, sources: _Sources, last: int) -> _Pushed:
    """What is pushed, by layer and place."""
    active, error_LTD, embed_TD, layer_N, pos_N = sources
    L, _, D = error_LTD.shape
    B, col_B = chunk.capacity, chunk.col_B
    write_LBD = np.zeros((L, B, D), error_LTD.dtype)
    embed_BD = np.zeros((B, D), error_LTD.dtype)
    for b, n in enumerate(col_B):
        layer, pos = int(layer_N[n]), pos_N[n]
        if n < len(active.layer_A):
            rows_MD = active.decoder[layer][active.row_A[n]]
            write_LBD[layer : layer + len(rows_MD), b] = active.value_A[n] * rows_MD
        elif layer >= 0:
            write_LBD[layer, b] = error_LTD[layer, pos]
        else:
            embed_BD[b] = embed_TD[pos]
    return _Pushed(
        pos_B=np.pad(pos_N[col_B] - chunk.start, (0, B - len(col_B))),
        embed_BD=embed_BD,
        write_LBD=write_LBD,
        start=np.asarray(chunk.start, np.int32),
        first=np.asarray(max(layer_N[col_B].min(), 0), np.int32),
        last=np.asarray(last, np.int32),
    )


class _Edges(NamedTuple):
    """Edges read off together, padded."""

    row_E: np.ndarray  # of the queries
    place_E: np.ndarray  # of the column in its chunk
    pos_E: np.ndarray  # of the target, within the window


@jax.jit
def _read(
    mixed_LWHBC: Array, query_LRHC: Array, x: _Edges, first: Array, last: Array
) -> Array:
    """Loads of edges, [L, E, H]: what heads move dotted with what targets read."""

    def level(layer: Array, load_LEH: Array) -> Array:
        query_EHC = query_LRHC[layer, x.row_E]
        mixed_EHC = mixed_LWHBC[layer, x.pos_E, :, x.place_E]
        return load_LEH.at[layer].set((query_EHC * mixed_EHC).sum(-1))

    L, _, H, _, _ = mixed_LWHBC.shape
    load_LEH = jnp.zeros((L, len(x.row_E), H), query_LRHC.dtype)
    return jax.lax.fori_loop(first, last + 1, level, load_LEH)


@jax.jit
def _query(read_RD: Array, o_HCD: Array) -> Array:
    return jnp.einsum("RD,HCD->RHC", read_RD, o_HCD)


def _queries(
    active: Active, rows: RowTargets, o_LHCD: Array, *, cfg: LMConfig
) -> Array:
    """What every row reads of every head below it, [L, R, H, C], R padded.

    Side by side with its MLP, a head writes where the MLP does.
    """
    pad = ((0, bucket(len(rows.pos_R)) - len(rows.pos_R)), (0, 0))
    query = [
        _query(np.pad(write_RD if cfg.parallel else mid_RD, pad), o_LHCD[layer])
        for layer, write_RD, mid_RD in residual_reads(active, rows)
    ]
    return jnp.stack(query[::-1])


class _Table:
    """The table while it is filled in."""

    def __init__(self, n_edges: int, per_edge: int, dtype: np.dtype) -> None:
        self.per_edge = per_edge
        self.layer_EJ = np.zeros((n_edges, per_edge), np.int16)
        self.head_EJ = np.zeros((n_edges, per_edge), np.int16)
        self.load_EJ = np.zeros((n_edges, per_edge), dtype)
        self.rest_E = np.zeros(n_edges, dtype)

    def put(self, edge_E: np.ndarray, load_LEH: np.ndarray, first: int) -> None:
        """List the strongest heads of some edges, and sum up all others."""
        H, n = load_LEH.shape[2], len(edge_E)
        load_EX = load_LEH[first:, :n].swapaxes(0, 1).reshape(n, -1).copy()
        size_EX = np.abs(load_EX)
        each = np.arange(n)
        # A few rounds of argmax take less than sorting, or even partitioning.
        for j in range(min(self.per_edge, load_EX.shape[1])):
            best_E = size_EX.argmax(1)
            self.layer_EJ[edge_E, j] = first + best_E // H
            self.head_EJ[edge_E, j] = best_E % H
            self.load_EJ[edge_E, j] = load_EX[each, best_E]
            size_EX[each, best_E] = -1
            load_EX[each, best_E] = 0
        self.rest_E[edge_E] = load_EX.sum(1)


def strongest_kept(graph: Graph, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the n strongest kept edges, in the order of the rows.

    Strong is what most influence passes, see `edge_influence`.
    """
    row_E, col_E = np.nonzero(graph.pruning.keep_edge_RN)
    if n < len(row_E):
        score_E = edge_influence(graph, row_E, graph.edge_RN[row_E, col_E])
        best = np.sort(np.argsort(-score_E, kind="stable")[:n])
        row_E, col_E = row_E[best], col_E[best]
    return row_E, col_E


def head_loadings(
    params: LMParams,
    recording: Recording,
    active: Active,
    error_LTD: np.ndarray,
    rows: RowTargets,
    row_E: np.ndarray,
    col_E: np.ndarray,
    *,
    cfg: LMConfig,
    per_edge: int = 8,
    n_tokens: int | None = None,
    direct: csr_array | None = None,
    on_edges: Callable[[int, int], None] = lambda done, total: None,
) -> HeadLoads:
    """Edges by the last head that moved them: A = A0 + sum of load(l, h).

    load(l, h) holds the paths whose last hop before the target is head h of layer l.
    Costs one push through the frozen stream per distinct column, as much as pulling
    back as many rows, and up to L·H·C multiplications per edge; L·R·H·C numbers are
    held for the R rows in use. The pull-back definition takes L·H/2 passes per row.

    Args:
      params: the model.
      recording: its clean pass.
      active: the source features, `graph_active` of a graph.
      error_LTD: error vectors of all active features.
      rows: the targets, `graph_rows` of a graph.
      row_E: row of each edge, such as ``np.nonzero(graph.pruning.keep_edge_RN)[0]``.
      col_E: column of each edge.
      cfg: model shape.
      per_edge: heads to list for an edge, the strongest.
      n_tokens: length of the prompt if the recording is padded beyond it.
      direct: `direct_edges` of the rows, if at hand.
      on_edges: progress, called with (edges done, edges in all).
    """
    n_tokens = n_tokens or error_LTD.shape[1]
    error_LTD = error_LTD[:, :n_tokens]
    embed_TD = np.asarray(recording.embed_TD)[:n_tokens]
    if direct is None:
        direct = direct_edges(active, error_LTD, embed_TD, rows)
    table = _Table(
        len(row_E), min(per_edge, cfg.n_layers * cfg.n_heads), error_LTD.dtype
    )
    sources = _sources(active, error_LTD, embed_TD)
    with jax.default_matmul_precision("highest"):
        stream = frozen_stream(params, recording, active)
        _fill(table, stream, sources, rows, row_E, col_E, cfg, on_edges)
    return HeadLoads(
        row_E=np.asarray(row_E, np.int32),
        col_E=np.asarray(col_E, np.int32),
        direct_E=_at(direct, row_E, col_E),
        layer_EJ=table.layer_EJ,
        head_EJ=table.head_EJ,
        load_EJ=table.load_EJ,
        rest_E=table.rest_E,
    )


def _at(sparse: csr_array, row_E: np.ndarray, col_E: np.ndarray) -> np.ndarray:
    """Entries of a sparse matrix."""
    if len(row_E) == 0:
        return np.zeros(0, sparse.dtype)
    return np.asarray(sparse[row_E, col_E]).ravel()


def _fill(
    table: _Table,
    stream: FrozenStream,
    sources: _Sources,
    rows: RowTargets,
    row_E: np.ndarray,
    col_E: np.ndarray,
    cfg: LMConfig,
    on_edges: Callable[[int, int], None],
) -> None:
    """Push the columns of all edges, chunk by chunk, and read the edges off."""
    # Nothing flows back in time, and windows do not reach back to see it.
    forward = np.flatnonzero(rows.pos_R[row_E] >= sources.pos_N[col_E])
    if len(forward) == 0:
        return
    row_E, col_E = row_E[forward], col_E[forward]
    used, used_E = np.unique(row_E, return_inverse=True)
    rows = rows.take(used)
    layer_E, pos_E = rows.layer_R[used_E], rows.pos_R[used_E]
    query_LRHC = _queries(sources.active, rows, stream.blocks.o_LHCD, cfg=cfg)
    col, column_E = np.unique(col_E, return_inverse=True)
    chunk_of, place_of = np.zeros((2, len(col)), np.int64)
    chunks = list(_chunks(col, sources, stream.scale_LT.shape[1], _flops(cfg)))
    for i, chunk in enumerate(chunks):
        at = np.searchsorted(col, chunk.col_B)
        chunk_of[at], place_of[at] = i, np.arange(len(at))
    chunk_E, place_E = chunk_of[column_E], place_of[column_E]
    # Rows of similar layers together: fewer layers to read.
    order = np.lexsort((layer_E, chunk_E))
    bound = np.searchsorted(chunk_E[order], np.arange(len(chunks) + 1))
    pending: tuple[np.ndarray, Array, int] | None = None
    done = 0
    for chunk, start, stop in zip(chunks, bound[:-1], bound[1:], strict=True):
        top = min(int(layer_E[order[stop - 1]]), cfg.n_layers - 1)
        x = _pushed(chunk, sources, top)
        mixed_LWHBC = _push(stream, x, cfg=cfg, width=chunk.width)
        for at in range(start, stop, _EDGES):
            edge_E = order[at : min(at + _EDGES, stop)]
            pad = (0, _EDGES - len(edge_E))
            edges = _Edges(
                row_E=np.pad(used_E[edge_E], pad),
                place_E=np.pad(place_E[edge_E], pad),
                pos_E=np.pad(pos_E[edge_E] - chunk.start, pad),
            )
            last = np.minimum(layer_E[edge_E[-1]], top).astype(np.int32)
            load = _read(mixed_LWHBC, query_LRHC, edges, x.first, last)
            # The device works on these edges while the host lists those before.
            if pending is not None:
                table.put(pending[0], np.asarray(pending[1]), pending[2])
            pending = forward[edge_E], load, int(x.first)
            done += len(edge_E)
            on_edges(done, len(forward))
    if pending is not None:
        table.put(pending[0], np.asarray(pending[1]), pending[2])


def _flops(cfg: LMConfig) -> float:
    """Operations of one column at one position, through half of the layers."""
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    return cfg.n_layers * cfg.d_model * (heads + kv_heads)
