"""What total effects by response go through first: values, queries, keys, norms, gates.

A node's total effect on the contrast is a sum over rows: what a unit of the row does to
the contrast, times the node's edge by response. Edges have parts (maths 22.4), and so
has the sum (maths 22.81). No edge is needed for it: what all rows read, times what a
unit of each does, goes down together as one vector of each state of
`jaxclt.graph.live.Parts`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.graph.answers import written_live
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.live import STATES, split_parts
from jaxclt.graph.plan import Chunk
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.rows import Edges, Puller, Shared, write_rows
from jaxclt.graph.travel import descend
from jaxclt.precision import jit

__all__ = ["effect_parts"]


def effect_parts(
    p: Prompt,
    rows: RowTargets,
    unit_R: np.ndarray,
    value_RN: np.ndarray,
    puller: Puller,
    *,
    gated: bool,
) -> np.ndarray:
    """Total effects by response of all nodes on the contrast, by parts, [Q, N].

    Parts are `EFFECT_PARTS`; they sum to the total effects.

    Args:
      p: the prompt, with the features that are nodes.
      rows: what the graph's rows read, from `jaxclt.graph.answers.rows_in_parts`.
      unit_R: `jaxclt.graph.yardstick.unit_effects` of the graph by response.
      value_RN: its edges by value.
      puller: of the prompt, down `jaxclt.graph.live.Parts`.
      gated: whether gates of rows answer.
    """
    L, (T, D) = p.cfg.n_layers, p.recording.embed_TD.shape
    read_SRD = rows.read_SRD * unit_R[:, None]
    read_MTSD = np.zeros((L + 1, T, len(read_SRD), D), read_SRD.dtype)
    np.add.at(read_MTSD, (rows.layer_R, rows.pos_R), read_SRD.swapaxes(0, 1))
    found = _down(puller.held, read_MTSD)
    A = len(p.active.layer_A)
    every_A, Q = np.arange(A), len(STATES)
    edge_ZPWQ, *others = map(np.asarray, found)
    state_QN = np.zeros((Q, p.layout(A).n_columns), read_SRD.dtype)
    write_rows(
        Chunk(np.arange(Q), T, Q),
        [edge_ZPWQ.reshape(-1, Q), *others],
        every_A,
        puller.bank.place(every_A, 0, T),
        p.layout(A),
        state_QN,
    )
    for k, edge_N, norm_N in written_live(p):
        state_QN[:2] += unit_R[A + k] * norm_N
        state_QN[0] += unit_R[A + k] * edge_N
    state_QN[:, p.ignored_columns(A)] = 0
    return split_parts(state_QN, unit_R @ value_RN, gated)


@jit
def _down(held: Shared, read_MTSD: Array) -> Edges:
    way, (_, P, S, D) = held.way, read_MTSD.shape

    def add_reads(g_PQD: Array, layer: Array | int) -> Array:
        return g_PQD.at[:, :S].add(read_MTSD[layer])

    L, Q = way.cfg.n_layers, way.n_states
    top_PQD = add_reads(jnp.zeros((P, Q, D), read_MTSD.dtype), L)
    none = held.no_dots(P, Q)
    return held.edges(*descend(way, top_PQD, L - 1, add_reads, held.add_dots, none))
