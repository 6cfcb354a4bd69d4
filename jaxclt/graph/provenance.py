"""How an edge travelled: straight up the residual stream, or moved by which heads.

The frozen stream is a polynomial in one gate per attention head, so an edge splits
exactly, without enumerating paths (maths 7.1):

    A = A0 + A1 + ... + AL                     by the number of heads passed
    A = A0 + sum over (l, h) of load(l, h)     by the last head before the target
    A = bypass(l) + sum over h of through(l, h)           by what happens at a layer l

A0 is the residual-direct part of Circuit Tracing (2025), section 4; the rest is
attention-mediated. A dictionary's skip is part of the residual stream here.

Here is the first, whole rows pulled back with paths kept apart by how many heads they
passed, and A0 alone in closed form. `jaxclt.graph.heads` has the second. The last is
what rows become when patterns of one layer are multiplied by gates. Columns are those
of `jaxclt.graph.graph.Graph`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.sparse import csr_array

from jaxclt.clt.active import Active
from jaxclt.graph.bank import RowTargets, written_at
from jaxclt.graph.columns import Columns
from jaxclt.graph.graph import Graph
from jaxclt.graph.plan import Plan
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.rows import edge_rows, make_puller
from jaxclt.graph.stream import make_stream
from jaxclt.graph.travel import Hops
from jaxclt.types import Recording

__all__ = ["crop", "direct_edges", "graph_active", "hop_spectrum", "node_mask"]


def crop(
    recording: Recording, active: Active, n_tokens: int
) -> tuple[Recording, Active]:
    """A padded recording without its padding, and what is active on the rest."""

    def cut(name: str, leaf: Any) -> Any:
        if leaf is None or name == "frozen":
            return leaf
        axes = name.rpartition("_")[2]  # the suffix names them, see `jaxclt.types`
        return leaf[tuple(slice(n_tokens if axis in "TS" else None) for axis in axes)]

    def cropped(part: Any) -> Any:
        cuts = {name: cut(name, leaf) for name, leaf in vars(part).items()}
        return dataclasses.replace(part, **cuts)

    recording = cropped(recording).replace(frozen=cropped(recording.frozen))
    active = dataclasses.replace(
        active.where(active.pos_A < n_tokens), scale_LT=active.scale_LT[:, :n_tokens]
    )
    return recording, active


def graph_active(graph: Graph, active: Active) -> Active:
    """The active features that are nodes of a graph, in its order."""
    return active.where(node_mask(graph, active))


def node_mask(graph: Graph, active: Active) -> np.ndarray:
    """Which active features are nodes of a graph, bool [A]."""

    def key(a: Graph | Active) -> np.ndarray:
        place = a.layer_A.astype(np.int64) * graph.n_tokens + a.pos_A
        return (place << 32) + a.feature_A

    return np.isin(key(active), key(graph))


def direct_edges(p: Recorded, rows: RowTargets) -> csr_array:
    """The residual-direct part of every edge, [R, N]: all attention heads off.

    Closed form: value x <decoder writes below the target's layer, target's read>, zero
    between positions, hence sparse. The columns of a position are pushed up the
    residual stream together and read by the rows of every layer: about 1 / (L T) of the
    work of the dot products of plain attribution.

    Args:
      p: the prompt.
      rows: the targets.
    """
    R, N = len(rows.pos_R), Columns(p).layout.n_columns
    blocks = [_direct_block(p, rows, pos) for pos in range(p.n_tokens)]
    n_R = np.zeros(R, np.int64)
    for row, col, _ in blocks:
        n_R[row] = len(col)
    start_R = np.concatenate([[0], np.cumsum(n_R)])
    index = np.zeros(start_R[-1], np.int32)
    data = np.zeros(start_R[-1], rows.read_RD.dtype)
    for row, col, edge_RN in blocks:
        place = start_R[row][:, None] + np.arange(len(col))
        index[place], data[place] = col[None, :], edge_RN
    found = csr_array((data, index, start_R), shape=(R, N))
    found.eliminate_zeros()
    return found


def _direct_block(
    p: Recorded, rows: RowTargets, pos: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns of one position, and the direct edges between them."""
    active, layout, L = p.active, Columns(p).layout, p.cfg.n_layers
    row = np.flatnonzero(rows.pos_R == pos)
    feature = np.flatnonzero(active.pos_A == pos)
    errors = layout.at("error", np.arange(L), pos)
    col = np.concatenate([feature, errors, [layout.at("embed", pos)]])
    first_L = np.searchsorted(active.layer_A[feature], np.arange(L + 1))
    # What the columns hold of the residual stream on the way up.
    embed_D = np.asarray(p.recording.embed_TD)[pos]
    state_ND = np.zeros((len(col), len(embed_D)), rows.read_RD.dtype)
    state_ND[-1] = embed_D
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
        if active.skip is not None:
            state_ND[has] += active.skip.at(layer, [pos]).write(state_ND[has])
        for slots, write_AD in written_at(active, layer, pos):
            lo, hi = np.searchsorted(feature, [slots.start, slots.stop])
            state_ND[lo:hi] += write_AD
        state_ND[len(feature) + layer] += p.error_LTD[layer, pos]
    return row, col, edge_RN


_AT_ONCE = 128  # rows times states of a path


def hop_spectrum(p: Recorded, rows: RowTargets, *, max_hops: int = 3) -> np.ndarray:
    """Rows by the number of heads passed, [max_hops + 1, R, N]; they sum to the rows.

    Entry k holds the paths with k hops, the last one all with `max_hops` or more.
    Costs max_hops + 1 plain attributions of the rows.
    """
    (T, _), Q, R = p.recording.embed_TD.shape, max_hops + 1, len(rows.pos_R)
    plan = Plan(band_end=(T,), capacities=(max(1, min(R, _AT_ONCE // Q)),))
    edge_QRN = np.zeros((Q, R, Columns(p).layout.n_columns), rows.read_RD.dtype)
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    way = Hops(make_stream(p, pull=True), n_states=Q)
    puller = make_puller(p, plan=plan, mesh=mesh, way=way)
    edge_rows(puller, rows, edge_QRN)
    return edge_QRN
