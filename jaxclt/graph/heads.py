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

from jaxclt.graph.bank import RowTargets
from jaxclt.graph.columns import Columns
from jaxclt.graph.graph import Graph
from jaxclt.graph.head_table import HeadLoads
from jaxclt.graph.plan import Chunk, Plan
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.provenance import direct_edges
from jaxclt.graph.rows import padded_reads, pipelined
from jaxclt.graph.shares import edge_influence
from jaxclt.graph.stream import Stream, make_stream
from jaxclt.graph.travel import Reads, Writes, push
from jaxclt.lm.step import down
from jaxclt.precision import jit
from jaxclt.shapes import bucket

__all__ = ["head_loadings", "strongest_kept"]

_TOKENS = 256  # columns times positions pushed together
_WINDOWS = 6  # sizes of the windows, a program to compile each
_FLOPS_WORTH_WINDOWS = 2e10  # below this, one window is cheaper than more programs
_EDGES = 2048  # edges read off together


@partial(jit, static_argnames="width")
def _push(stream: Stream, writes: Writes, end: Array, *, width: int) -> Array:
    """What all heads below `end` gather, before their output maps: [L, W, B, H, C]."""
    cfg, (_, B, _) = stream.cfg, writes.write_MBD.shape
    shape = (width, B, cfg.n_heads, cfg.d_head)

    def keep(
        layer: Array, _: Array, mixed: Array, __: Array, mixed_LWBHC: Array
    ) -> Array:
        return mixed_LWBHC.at[layer].set(mixed.reshape(shape))

    mixed_LWBHC = jnp.zeros((cfg.n_layers, *shape), writes.write_MBD.dtype)
    return push(stream, writes, keep, mixed_LWBHC, n_positions=width, end=end)[1]


@jit
def _queries(stream: Stream, reads: Reads) -> Array:
    """What every target reads of every head below it, [L, R, H, C].

    Down the residual stream alone: no head after the last one counts.
    """
    layer_R, pos_R, (read_RD,) = reads
    cfg = stream.cfg

    def level(g_RD: Array, layer: Array) -> tuple[Array, Array]:
        skip = None if stream.skip is None else stream.skip.at(layer, pos_R)
        here_RD = jnp.where((layer_R == layer)[:, None], read_RD, 0)
        g_RD, moved_RD = down(g_RD, skip, lambda g_RD: g_RD + here_RD, cfg=cfg)
        query_RGJC = jnp.einsum("RD,GJCD->RGJC", moved_RD, stream.output[layer])
        return g_RD, query_RGJC.reshape(-1, cfg.n_heads, cfg.d_head)

    g_RD = jnp.where((layer_R == cfg.n_layers)[:, None], read_RD, 0)
    every_L = jnp.arange(cfg.n_layers, dtype=layer_R.dtype)
    return jax.lax.scan(level, g_RD, every_L, reverse=True)[1]


class _Edges(NamedTuple):
    """Edges whose sources may reach their targets."""

    row_E: np.ndarray
    col_E: np.ndarray
    query_E: np.ndarray  # what the target reads, among the queries


class _At(NamedTuple):
    """Where edges are read off, padded."""

    query_E: np.ndarray
    place_E: np.ndarray  # of the column in its chunk
    pos_E: np.ndarray  # of the target, within the window


@jit
def _read(
    mixed_LWBHC: Array, query_LRHC: Array, x: _At, first: Array, end: Array
) -> Array:
    """Loads of edges, [L, E, H]: what heads gather dotted with what targets read."""

    def level(layer: Array, load_LEH: Array) -> Array:
        query_EHC = query_LRHC[layer, x.query_E]
        mixed_EHC = mixed_LWBHC[layer, x.pos_E, x.place_E]
        return load_LEH.at[layer].set((query_EHC * mixed_EHC).sum(-1))

    L, _, _, H, _ = mixed_LWBHC.shape
    load_LEH = jnp.zeros((L, len(x.query_E), H), query_LRHC.dtype)
    return jax.lax.fori_loop(first, end, level, load_LEH)


def _list(
    loads: HeadLoads, edge_E: np.ndarray, load_LEH: np.ndarray, first: int
) -> None:
    """List the strongest heads of some edges, and sum up all others."""
    H, n = load_LEH.shape[2], len(edge_E)
    load_EX = load_LEH[first:, :n].swapaxes(0, 1).reshape(n, -1).copy()
    size_EX = np.abs(load_EX)
    each = np.arange(n)
    # A few rounds of argmax take less than sorting, or even partitioning.
    for j in range(min(loads.load_EJ.shape[1], load_EX.shape[1])):
        best_E = size_EX.argmax(1)
        loads.layer_EJ[edge_E, j] = first + best_E // H
        loads.head_EJ[edge_E, j] = best_E % H
        loads.load_EJ[edge_E, j] = load_EX[each, best_E]
        size_EX[each, best_E] = -1
        load_EX[each, best_E] = 0
    loads.rest_E[edge_E] = load_EX.sum(1)


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
    p: Recorded,
    rows: RowTargets,
    row_E: np.ndarray,
    col_E: np.ndarray,
    *,
    per_edge: int = 8,
    direct: csr_array | None = None,
    on_edges: Callable[[int, int], None] = lambda done, total: None,
) -> HeadLoads:
    """Edges by the last head that moved them: A = A0 + sum of load(l, h).

    load(l, h) holds the paths whose last hop before the target is head h of layer l.
    Costs one push through the frozen stream per distinct column, as much as pulling
    back as many rows, and up to L·H·C multiplications per edge; L·R·H·C numbers are
    held for the R rows in use. The pull-back definition takes L·H/2 passes per row.

    Args:
      p: the prompt; its active features are those of the graph.
      rows: the targets: the graph's features, then its targets.
      row_E: row of each edge, such as ``np.nonzero(graph.pruning.keep_edge_RN)[0]``.
      col_E: column of each edge.
      per_edge: heads to list for an edge, the strongest.
      direct: `direct_edges` of the rows, if at hand.
      on_edges: progress, called with (edges done, edges in all).
    """
    direct = direct_edges(p, rows) if direct is None else direct
    E, dtype = len(row_E), p.error_LTD.dtype
    J = min(per_edge, p.cfg.n_layers * p.cfg.n_heads)
    loads = HeadLoads(
        row_E=np.asarray(row_E, np.int32),
        col_E=np.asarray(col_E, np.int32),
        # scipy does not take no indices at all
        direct_E=np.asarray(direct[row_E, col_E]).ravel() if E else np.zeros(0, dtype),
        layer_EJ=np.zeros((E, J), np.int16),
        head_EJ=np.zeros((E, J), np.int16),
        load_EJ=np.zeros((E, J), dtype),
        rest_E=np.zeros(E, dtype),
    )
    _fill(loads, p, rows, on_edges)
    return loads


class _Group(NamedTuple):
    """Edges read off together, from what the columns of one chunk have brought."""

    edge_E: np.ndarray
    mixed_LWBHC: Array
    at: _At
    first: int  # lowest layer whose heads are listed
    end: int  # no target reads a head of this layer or above


def _fill(
    loads: HeadLoads,
    p: Recorded,
    rows: RowTargets,
    on_edges: Callable[[int, int], None],
) -> None:
    """Push the columns of all edges, chunk by chunk, and read the edges off."""
    columns, row_E, col_E = Columns(p), loads.row_E, loads.col_E
    # Nothing flows back in time, and windows do not reach back to see it.
    forward = np.flatnonzero(rows.pos_R[row_E] >= columns.positions[col_E])
    if len(forward) == 0:
        return
    used, used_E = np.unique(row_E[forward], return_inverse=True)
    stream = make_stream(p, pull=False)
    every = Chunk(used, p.n_tokens, bucket(len(used)))
    query_LRHC = _queries(stream, padded_reads(rows, every))

    def read(group: _Group) -> Array:
        first, end = (np.asarray(x, np.int32) for x in (group.first, group.end))
        return _read(group.mixed_LWBHC, query_LRHC, group.at, first, end)

    done = 0
    edges = _Edges(row_E[forward], col_E[forward], used_E)
    groups = _groups(columns, stream, rows, edges)
    for group, load_LEH in pipelined(groups, read):
        edge_E = forward[group.edge_E]
        _list(loads, edge_E, np.asarray(load_LEH), group.first)
        done += len(edge_E)
        on_edges(done, len(forward))


def _groups(
    columns: Columns, stream: Stream, rows: RowTargets, edges: _Edges
) -> Iterator[_Group]:
    """Push the columns of edges, and cut the edges into groups."""
    n_tokens, L = columns.p.n_tokens, columns.p.cfg.n_layers
    layer_E, pos_E = rows.layer_R[edges.row_E], rows.pos_R[edges.row_E]
    col, column_E = np.unique(edges.col_E, return_inverse=True)
    plan = _plan(len(col), columns)
    chunks = plan.chunks(L - columns.sites[col], n_tokens - columns.positions[col])
    chunk_of, place_of = np.zeros((2, len(col)), np.int64)
    for i, chunk in enumerate(chunks):
        chunk_of[chunk.index_B] = i
        place_of[chunk.index_B] = np.arange(len(chunk.index_B))
    # Targets of similar layers together: fewer layers to read.
    order = np.lexsort((layer_E, chunk_of[column_E]))
    bound = np.searchsorted(chunk_of[column_E][order], np.arange(len(chunks) + 1))
    for chunk, lo, hi in zip(chunks, bound[:-1], bound[1:], strict=True):
        width, index_B = chunk.n_positions, col[chunk.index_B]
        start = max(n_tokens - width, 0)
        end = min(int(layer_E[order[hi - 1]]) + 1, L)
        writes = columns.writes(index_B, chunk.capacity, start)
        mixed_LWBHC = _push(stream, writes, np.asarray(end, np.int32), width=width)
        for i in range(lo, hi, _EDGES):
            edge_E = order[i : min(i + _EDGES, hi)]
            pad = (0, _EDGES - len(edge_E))
            places = place_of[column_E[edge_E]], pos_E[edge_E] - start
            at_E = (np.pad(x, pad) for x in (edges.query_E[edge_E], *places))
            yield _Group(
                edge_E,
                mixed_LWBHC,
                _At(*at_E),
                first=max(int(writes.first) - 1, 0),
                end=min(int(layer_E[edge_E[-1]]) + 1, end),
            )


def _plan(n_columns: int, columns: Columns) -> Plan:
    """Windows and chunks of the distinct columns.

    Sizes depend on the padded length, so that prompts share their programs.
    """
    cfg, padded = columns.p.cfg, len(columns.p.recording.token_T)
    # Operations of a column at one position, through half of the layers.
    heads = (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head
    flops = cfg.n_layers * cfg.d_model * heads
    few = n_columns * flops * columns.p.n_tokens / 2 < _FLOPS_WORTH_WINDOWS
    n = 1 if few else min(_WINDOWS, padded)
    ends = tuple(-(-padded * (i + 1) // n) for i in range(n))
    return Plan(band_end=ends, capacities=(_TOKENS,), tokens=_TOKENS)
