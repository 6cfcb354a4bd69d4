"""Chosen edges by the last head that moved them, for a whole pruned graph at once.

    A = A0 + sum over (l, h) of load(l, h)

load(l, h) holds the paths whose last hop before the target is head h of layer l (spec
3.4). Sources are pushed forward once, which makes every last head of every target
readable on the way; pulling targets back would take one pass per target and head.

Axes besides the usual: E edges, J heads of an edge, X all heads of all layers, B
columns pushed together. Columns are those of `jaxclt.graph.graph.Graph`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.clt.active import Active
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.provenance import (
    FrozenStream,
    direct_edges,
    frozen_stream,
    residual_reads,
)
from jaxclt.lm import layers
from jaxclt.lm.config import LMConfig
from jaxclt.types import Block, LMParams, Recording

__all__ = ["HeadLoads", "explain", "head_loadings"]

_LEAST_BAND = 16  # positions; each of at most 4 bands is a program to compile


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadLoads:
    """Edges by the last head that moved them; ``edge = direct + sum(load) + rest``."""

    row_E: np.ndarray
    col_E: np.ndarray
    direct_E: np.ndarray  # residual-direct, A0
    layer_EJ: np.ndarray  # int32, strongest first
    head_EJ: np.ndarray  # int32
    load_EJ: np.ndarray
    rest_E: np.ndarray  # all other heads

    @property
    def attention(self) -> np.ndarray:
        """The attention-mediated parts, [E]."""
        return self.load_EJ.sum(1) + self.rest_E

    @property
    def edge(self) -> np.ndarray:
        """The whole edges, [E]."""
        return self.direct_E + self.attention


class _Pushed(NamedTuple):
    """Columns pushed together, and the edges that are read off on the way."""

    pos_B: np.ndarray
    embed_BD: np.ndarray
    write_LBD: np.ndarray
    row_E: np.ndarray
    place_E: np.ndarray  # of the column in the chunk
    pos_E: np.ndarray  # of the target
    first: np.ndarray  # lowest layer with a write
    last: np.ndarray  # highest layer read


@partial(jax.jit, static_argnames=("cfg", "start"))
def _push(
    stream: FrozenStream, query_LRHC: Array, x: _Pushed, *, cfg: LMConfig, start: int
) -> Array:
    """Loads [L, H, E]; no position before `start` is touched."""
    T, H = stream.scale_LT.shape[1] - start, cfg.n_heads
    B, D = x.embed_BD.shape
    source_B = jnp.arange(B)

    def mix(p: Block, pattern_HTS: Array, scale_T: Array, resid_TD: Array) -> Array:
        """Values through the pattern, before the output map: see `layers.move`."""
        normed_TD = layers.normalise(resid_TD, scale_T, p.norm_attn_LD)
        v_SGC = jnp.einsum("SD,DGC->SGC", normed_TD, p.v_LDGC)
        pattern_GJTS = pattern_HTS.reshape(cfg.n_kv_heads, -1, T, T)
        mixed_TGJC = jnp.einsum("GJTS,SGC->TGJC", pattern_GJTS, v_SGC)
        return mixed_TGJC.reshape(T, H, cfg.d_head)

    def level(layer: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        resid_BTD, load_LHE = state
        p, pattern_HTS, scale_T, skip = jax.tree.map(lambda leaf: leaf[layer], stream)
        see = partial(mix, p, pattern_HTS[:, start:, start:], scale_T[start:])
        mixed_BTHC = jax.vmap(see)(resid_BTD)
        load_HE = jnp.einsum(
            "EHC,EHC->HE",
            query_LRHC[layer, x.row_E],
            mixed_BTHC[x.place_E, x.pos_E - start],
        )
        resid_BTD = resid_BTD + jnp.einsum("BTHC,HCD->BTD", mixed_BTHC, p.o_LHCD)
        if skip is not None:
            read_BTD = resid_BTD * skip[0][None, start:]
            resid_BTD = resid_BTD + jnp.einsum("BTD,DE->BTE", read_BTD, skip[1])
        write_BD = jnp.asarray(x.write_LBD)[layer]
        resid_BTD = resid_BTD.at[source_B, x.pos_B - start].add(write_BD)
        return resid_BTD, load_LHE.at[layer].set(load_HE)

    dtype = x.embed_BD.dtype
    resid_BTD = jnp.zeros((B, T, D), dtype)
    resid_BTD = resid_BTD.at[source_B, x.pos_B - start].set(x.embed_BD)
    load_LHE = jnp.zeros((cfg.n_layers, H, len(x.row_E)), dtype)
    done = jax.lax.fori_loop(x.first, x.last + 1, level, (resid_BTD, load_LHE))
    return done[1]


@jax.jit
def _query(read_RD: Array, o_HCD: Array) -> Array:
    return jnp.einsum("RD,HCD->RHC", read_RD, o_HCD)


class _Sources(NamedTuple):
    """All columns: what they write, and where (embeddings at layer -1)."""

    active: Active
    error_LTD: np.ndarray
    embed_TD: np.ndarray
    layer_N: np.ndarray
    pos_N: np.ndarray


def _sources(active: Active, error_LTD: np.ndarray, embed_TD: np.ndarray) -> _Sources:
    L, T, _ = error_LTD.shape
    layer_N = np.r_[active.layer_A, np.repeat(np.arange(L), T), np.full(T, -1)]
    pos_N = np.r_[active.pos_A, np.tile(np.arange(T), L), np.arange(T)]
    return _Sources(active, error_LTD, embed_TD, layer_N, pos_N)


class _Chunk(NamedTuple):
    """Columns of one position band, and the edges that start there."""

    col_B: np.ndarray
    edge_E: np.ndarray
    place_E: np.ndarray  # of the edge's column in the chunk
    start: int  # of the band


def _chunks(
    col_E: np.ndarray, sources: _Sources, size: int
) -> tuple[int, list[_Chunk]]:
    """Most edges of a chunk, and chunks: by position band, then late layers first."""
    width = max(_LEAST_BAND, -(-len(sources.embed_TD) // 4))
    col, count = np.unique(col_E, return_counts=True)
    band = sources.pos_N[col] // width
    by_col = np.split(np.argsort(col_E, kind="stable"), np.cumsum(count)[:-1])
    # Reading an edge off costs little next to pushing a column, even a padded one.
    most = max(256, 4 * int(count.max(initial=1)))
    groups: list[list[int]] = []
    for i in np.lexsort((-sources.layer_N[col], band)):
        group = groups[-1] if groups else []
        room = len(group) < size and count[[*group, i]].sum() <= most
        if not group or not room or band[i] != band[group[0]]:
            groups.append([])
        groups[-1].append(int(i))
    return most, [
        _Chunk(
            col[g],
            np.concatenate([by_col[i] for i in g]),
            np.repeat(np.arange(len(g)), count[g]),
            int(band[g[0]]) * width,
        )
        for g in groups
    ]


def _pushed(
    chunk: _Chunk, sources: _Sources, part: RowTargets, row_E: np.ndarray, shape: tuple
) -> _Pushed:
    """A chunk padded to a shape (columns, edges); `row_E` of its edges in `part`."""
    active, error_LTD, embed_TD, layer_N, pos_N = sources
    L, _, D = error_LTD.shape
    col_B, pad = chunk.col_B, (0, shape[1] - len(row_E))
    write_LBD = np.zeros((L, shape[0], D), error_LTD.dtype)
    embed_BD = np.zeros((shape[0], D), error_LTD.dtype)
    for b, n in enumerate(col_B):
        layer, pos = int(layer_N[n]), pos_N[n]
        if n < len(active.layer_A):
            rows_MD = active.decoder[layer][active.row_A[n]]
            write_LBD[layer : layer + len(rows_MD), b] = active.value_A[n] * rows_MD
        elif layer >= 0:
            write_LBD[layer, b] = error_LTD[layer, pos]
        else:
            embed_BD[b] = embed_TD[pos]
    last = np.minimum(part.layer_R[row_E].max(), L - 1)
    return _Pushed(
        pos_B=np.pad(pos_N[col_B], (0, shape[0] - len(col_B)), mode="edge"),
        embed_BD=embed_BD,
        write_LBD=write_LBD,
        row_E=np.pad(row_E, pad),
        place_E=np.pad(chunk.place_E, pad),
        pos_E=np.pad(np.maximum(part.pos_R[row_E], chunk.start), pad, mode="edge"),
        first=np.asarray(max(layer_N[col_B].min(), 0), np.int32),
        last=np.asarray(last, np.int32),
    )


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
    n_columns: int = 16,
    on_edges: Callable[[int, int], None] = lambda done, total: None,
) -> HeadLoads:
    """Edges by the last head that moved them: A = A0 + sum of load(l, h).

    load(l, h) holds the paths whose last hop before the target is head h of layer l.
    Costs one pass down per row without attention (all heads' queries, L·R·H·C numbers
    are held), and one push through the frozen stream per distinct column, as much as
    attributing as many rows; the pull-back definition takes L·H/2 of those per row.

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
      n_columns: columns pushed together.
      on_edges: progress, called with (edges done, edges in all).
    """
    used, row_E_used = np.unique(row_E, return_inverse=True)
    part = rows.take(used)
    sources = _sources(active, error_LTD, np.asarray(recording.embed_TD))
    most, chunks = _chunks(col_E, sources, n_columns)
    J = min(per_edge, cfg.n_layers * cfg.n_heads)
    index_EJ = np.zeros((len(row_E), J), np.int64)
    load_EJ = np.zeros(index_EJ.shape, part.read_RD.dtype)
    rest_E = np.zeros(len(row_E), part.read_RD.dtype)
    done = 0
    with jax.default_matmul_precision("highest"):
        stream = frozen_stream(params, recording, active)
        o_LHCD = params.blocks.o_LHCD
        query = [_query(mid, o_LHCD[l]) for l, _, mid in residual_reads(active, part)]
        query_LRHC = jnp.stack(query[::-1])
        for chunk in chunks:
            edge_E = chunk.edge_E
            row = row_E_used[edge_E]
            x = _pushed(chunk, sources, part, row, (n_columns, most))
            load_LHE = _push(stream, query_LRHC, x, cfg=cfg, start=chunk.start)
            load_EX = np.asarray(load_LHE).reshape(-1, most).T[: len(edge_E)]
            # Nothing flows back in time, whatever was read there.
            forward_E = part.pos_R[row] >= sources.pos_N[col_E[edge_E]]
            load_EX = load_EX * forward_E[:, None]
            index = np.argsort(-np.abs(load_EX), axis=1, kind="stable")
            ordered_EX = np.take_along_axis(load_EX, index, 1)
            index_EJ[edge_E], load_EJ[edge_E] = index[:, :J], ordered_EX[:, :J]
            rest_E[edge_E] = ordered_EX[:, J:].sum(1)
            done += len(edge_E)
            on_edges(done, len(row_E))
    direct_RN = direct_edges(active, error_LTD, sources.embed_TD, part)
    return HeadLoads(
        row_E=row_E,
        col_E=col_E,
        direct_E=direct_RN[row_E_used, col_E],
        layer_EJ=(index_EJ // cfg.n_heads).astype(np.int32),
        head_EJ=(index_EJ % cfg.n_heads).astype(np.int32),
        load_EJ=load_EJ,
        rest_E=rest_E,
    )


def explain(
    loads: HeadLoads,
    edge: int,
    *,
    source: str = "source",
    target: str = "target",
    hops: np.ndarray | None = None,
) -> str:
    """The parts of one edge as a plain-text table, with their shares of its value.

    Args:
      loads: of the edges of a graph.
      edge: which of them.
      source: name of the source.
      target: name of the target.
      hops: the edge's entries of `hop_spectrum`.
    """
    value = float(loads.edge[edge])
    parts = [
        ("edge", value),
        ("residual-direct", float(loads.direct_E[edge])),
        ("attention-mediated", float(loads.attention[edge])),
    ]
    for layer, head, load in zip(
        loads.layer_EJ[edge], loads.head_EJ[edge], loads.load_EJ[edge], strict=True
    ):
        if load:
            parts.append((f"  last head {layer}.{head}", float(load)))
    parts.append(("  other heads", float(loads.rest_E[edge])))
    hops = np.zeros(0) if hops is None else hops
    for k, part in enumerate(hops):
        more = " or more" if k == len(hops) - 1 else ""
        parts.append((f"{k}{more} hops", float(part)))
    lines = [f"{source} -> {target}"]
    for name, part in parts:
        share = f"{part / value:8.1%}" if value else ""
        lines.append(f"{name:<20} {part:+12.4g} {share}".rstrip())
    return "\n".join(lines)
