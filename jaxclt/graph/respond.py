"""Edges by response, and their parts: rows once more, past live attention and norms.

The rows of a graph are pulled down again by `jaxclt.graph.live.Live`, in the same
chunks on the same devices; those with edges that show in either reading a third time,
with their parts apart (`Parts`). What sources write, other features and errors are
held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxclt.clt.sites import reads_past_norm
from jaxclt.graph.answers import (
    answering,
    answering_rows,
    rows_in_parts,
    summed,
    written_live,
)
from jaxclt.graph.bank import RowTargets, writers
from jaxclt.graph.blocks import Edges
from jaxclt.graph.compute import plan_attribution, row_mesh
from jaxclt.graph.effect_parts import effect_parts
from jaxclt.graph.graph import Graph
from jaxclt.graph.live import STATES, live_parts, live_way, split_parts
from jaxclt.graph.packing import pack
from jaxclt.graph.plan import make_plan, mean_flops
from jaxclt.graph.prompt import Prompt, add_written, counted, cut_columns
from jaxclt.graph.response import by_response
from jaxclt.graph.response_table import (
    EFFECT_PARTS,
    PARTS,
    Response,
    ResponseParts,
)
from jaxclt.graph.rows import Puller, edge_rows, make_puller
from jaxclt.graph.travel import Way
from jaxclt.graph.yardstick import unit_effects

__all__ = ["respond"]


@dataclasses.dataclass(frozen=True)
class _Answering:
    """A prompt whose graph by value is known, and how its rows are pulled again."""

    p: Prompt
    selected: np.ndarray  # active features that are nodes
    past_norm: bool  # whether they read past the norm before the MLP
    chunk_size: int
    packed: bool
    on_rows: Callable[[int], None]

    def puller(self, p: Prompt, way: Way, n_rows: int, *, states: int = 1) -> Puller:
        """What pulls rows of a prompt, with some of its features, down a way."""
        T, mesh = len(p.recording.token_T), row_mesh(p.config)
        bank = pack(writers(p.active), T)
        plan = make_plan(
            n_rows,
            n_positions=T,
            flops_per_position=mean_flops(p.cfg, bank, T),
            n_bands=p.config.n_bands,
            chunk_size=max(1, self.chunk_size // states),
            n_devices=mesh.size,
        )
        packed = self.packed
        return make_puller(p, plan=plan, mesh=mesh, bank=bank, packed=packed, way=way)


def respond(
    p: Prompt,
    nodes: Prompt,
    graph: Graph,
    selected: np.ndarray,
    on_rows: Callable[[int, int], None],
    work: dict[str, Any],
) -> Response | None:
    """Edges of a graph by response, and the parts of those kept by either reading.

    Args:
      p: the prompt, with its dictionary.
      nodes: the same with the features that are nodes.
      graph: its graph by value, pruned.
      selected: which active features are its nodes.
      on_rows: progress, called with (rows done, rows planned).
      work: filled in with what was done.

    Returns:
      The response, or None if stopped before it was complete.
    """
    assert p.dictionary is not None, "checked with the prompt"
    memory = plan_attribution(
        p.active,
        p.n_targets,
        cfg=p.cfg,
        params=p.params,
        config=p.config,
        n_tokens=len(p.recording.token_T),
    )
    rows, R = answering_rows(nodes, p.dictionary), len(graph.edge_RN)
    a = _Answering(
        p,
        selected,
        reads_past_norm(p.dictionary.coder(p.cfg).site),
        memory.response_chunk,
        memory.packed,
        counted(on_rows, R),
    )
    states, gated_R = rows_in_parts(rows)
    edges = _edges(a, summed(rows))
    if edges is None:
        return None
    none_E = np.zeros(0, np.int32)
    part_QE = np.zeros((len(EFFECT_PARTS), 0), edges.edge_RN.dtype)
    response = Response(
        **edges._asdict(),
        effect_QN=np.zeros((len(EFFECT_PARTS), edges.edge_RN.shape[1])),
        parts=_table(none_E, none_E, part_QE),
    )
    other = by_response(dataclasses.replace(graph, response=response))
    keep_RN = graph.pruning.keep_edge_RN | other.pruning.keep_edge_RN
    n_more = int(keep_RN.any(1).sum())
    count = counted(lambda done, _: on_rows(R + done, R + n_more), n_more)
    work["response"] = {
        "rows": R,
        "rows_in_parts": n_more,
        "chunk_size": memory.response_chunk,
    }
    in_parts = dataclasses.replace(a, p=nodes, on_rows=count)
    found = _by_state(in_parts, states, keep_RN)
    if found is None:
        return None
    row_E, col_E = np.nonzero(keep_RN)
    part_QE = split_parts(found, graph.edge_RN[row_E, col_E], gated_R[row_E])
    parts = _table(row_E.astype(np.int32), col_E.astype(np.int32), part_QE)
    puller = a.puller(nodes, live_parts(nodes, past_norm=a.past_norm), 1)
    unit_R, gated = unit_effects(other), bool(gated_R.any())
    effect_QN = effect_parts(nodes, states, unit_R, graph.edge_RN, puller, gated=gated)
    return dataclasses.replace(response, effect_QN=effect_QN, parts=parts)


def _edges(a: _Answering, rows: RowTargets) -> Edges | None:
    """All rows by response; None if stopped."""
    p, A, R = a.p, len(a.selected), len(rows.pos_R)
    every = len(p.active.layer_A) == A
    edge_RN = np.zeros((R, p.layout(A).n_columns), p.error_LTD.dtype)
    rest_R, rest_abs_R = np.zeros(R), np.zeros(R)
    reached_R = edge_rows(
        a.puller(p, live_way(p, past_norm=a.past_norm), R),
        rows,
        edge_RN,
        pool_A=None if every else a.selected,
        rest_R=rest_R,
        rest_abs_R=rest_abs_R,
        on_rows=a.on_rows,
        stop=p.stop,
    )
    if not reached_R.all():
        return None
    add_written(answering(p), a.selected, edge_RN[A:], rest_R[A:], rest_abs_R[A:])
    ignored, nodes = p.ignored_columns(A), np.arange(A)
    edge_RN = cut_columns(edge_RN, A, nodes, ignored, rest_R, rest_abs_R)
    return Edges(edge_RN, rest_R, rest_abs_R)


def _by_state(
    a: _Answering, rows: RowTargets, keep_RN: np.ndarray
) -> np.ndarray | None:
    """Some edges of the nodes' graph by `STATES`, [Q, E]; None if stopped."""
    p, A, Q = a.p, len(a.p.active.layer_A), len(STATES)
    row_E, col_E = np.nonzero(keep_RN)
    keep_A = np.asarray(keep_RN[:, :A].any(0))
    kept = dataclasses.replace(p, active=p.active.where(keep_A))
    n_kept = int(keep_A.sum())
    # Columns of the kept features, then errors and embeddings.
    place_E = np.where(col_E < A, np.cumsum(keep_A)[col_E % A] - 1, col_E - A + n_kept)
    row, n_columns = np.unique(row_E), p.layout(n_kept).n_columns
    way = live_parts(kept, past_norm=a.past_norm)
    puller = a.puller(kept, way, len(row), states=Q)
    state_QE = np.zeros((Q, len(row_E)), p.error_LTD.dtype)
    # No more are held than all edges are.
    at_once = max(_FEWEST, keep_RN.size // (Q * n_columns))
    for some in np.split(row, np.arange(at_once, len(row), at_once)):
        state_QRN = np.zeros((Q, len(some), n_columns), p.error_LTD.dtype)
        reached_R = edge_rows(
            puller, rows.take(some), state_QRN, on_rows=a.on_rows, stop=p.stop
        )
        if not reached_R.all():
            return None
        here = slice(*np.searchsorted(row_E, [some[0], some[-1] + 1]))
        at_E = np.searchsorted(some, row_E[here])
        state_QE[:, here] = state_QRN[:, at_E, place_E[here]]
    _add_written(p, row_E, col_E, state_QE)
    return state_QE


_FEWEST = 128  # rows whose states are held


def _add_written(
    p: Prompt, row_E: np.ndarray, col_E: np.ndarray, state_QE: np.ndarray
) -> None:
    """Add edges to what writes the output that a target reads."""
    for k, edge_N, norm_N in written_live(p):
        here = np.flatnonzero(row_E == len(p.active.layer_A) + k)
        state_QE[:2, here] += norm_N[col_E[here]]
        state_QE[0, here] += edge_N[col_E[here]]


def _table(row_E: np.ndarray, col_E: np.ndarray, part_QE: np.ndarray) -> ResponseParts:
    parts = {f"{part}_E": part_QE[EFFECT_PARTS.index(part)] for part in PARTS}
    return ResponseParts(row_E=row_E, col_E=col_E, **parts)
