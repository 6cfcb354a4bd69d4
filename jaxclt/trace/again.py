"""What the model of a traced prompt can still say about its graph, on demand.

The prompt is recorded again, which takes a fraction of a second, and only the rows or
columns that are asked for are computed. Graphs keep what is cheap for all edges.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxclt.attending.routes import head_routes
from jaxclt.clt.coder import Dictionary
from jaxclt.clt.sites import reads_past_norm
from jaxclt.errors import InputError, check_at_least
from jaxclt.graph.answers import (
    answering_rows,
    past_final_norm,
    rows_in_parts,
    summed,
)
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.columns import Columns
from jaxclt.graph.derivative import model_derivative
from jaxclt.graph.explain import EdgeParts, EdgeResponse, check_edge, known_parts
from jaxclt.graph.graph import Graph
from jaxclt.graph.heads import head_loadings
from jaxclt.graph.inhibition import Inhibition, check_thresholds, find_inhibition
from jaxclt.graph.live import STATES, live_parts, split_parts
from jaxclt.graph.plan import Plan
from jaxclt.graph.prompt import Prompt, Recorded
from jaxclt.graph.provenance import graph_active, hop_spectrum
from jaxclt.graph.response_table import EFFECT_PARTS, PARTS
from jaxclt.graph.rows import edge_rows, make_puller
from jaxclt.graph.target_reads import target_reads
from jaxclt.graph.targets import token_targets
from jaxclt.io.model import Model
from jaxclt.trace.record import recorded

__all__ = ["edge_parts_with_model", "inhibition", "target_row"]
__all__ += ["TokenRows", "token_rows"]


def edge_parts_with_model(
    graph: Graph,
    source: str,
    target: str,
    *,
    model: Model,
    dictionary: Dictionary,
    max_hops: int = 3,
) -> EdgeParts:
    """`edge_parts` with all that the graph does not list.

    Hops, heads, and what a small change of the source does: its parts, and queries and
    keys by head.

    Raises:
      InputError: if there is no such edge, the graph is not from this model, or
        `max_hops` is below 1.
    """
    check_at_least(1, max_hops=max_hops)
    max_hops = min(max_hops, model.cfg.n_layers)  # a path passes no more heads
    parts = known_parts(graph, source, target)
    p = recorded(graph, model, dictionary)
    p = dataclasses.replace(p, active=graph_active(graph, p.active))
    answering = _answering(graph, parts.row, p, dictionary)
    rows = dataclasses.replace(answering, more_RSD=np.zeros(0))
    hop_Q = hop_spectrum(p, rows, max_hops=max_hops)[:, 0, parts.col]
    past_norm = reads_past_norm(dictionary.coder(p.cfg).site)
    response = _response(p, answering, parts.col, parts.edge, past_norm=past_norm)
    if not math.isclose(hop_Q.sum(), parts.edge, rel_tol=1e-2, abs_tol=1e-4):
        raise InputError(
            f"the model gives this edge {hop_Q.sum():.4g}, the graph {parts.edge:.4g}: "
            "trace the prompt again"
        )
    parts = dataclasses.replace(
        parts,
        hops=tuple(hop_Q.tolist()),
        direct=float(hop_Q[0]),
        attention=parts.edge - float(hop_Q[0]),
        response=response,
    )
    check_edge(graph, parts)
    if parts.heads is None:
        only = np.zeros(1, np.int64), np.array([parts.col])
        loads = head_loadings(p, rows, *only)
        parts = dataclasses.replace(
            parts, heads=loads.listed(0), other_heads=float(loads.rest_E[0])
        )
    return parts


def target_row(graph: Graph, k: int, p: Recorded) -> RowTargets:
    """What a target of a graph reads.

    Args:
      graph: traced.
      k: which of its targets.
      p: the graph's prompt, recorded.

    Raises:
      InputError: for a direction, which no file holds.
    """
    pos = int(graph.target_pos_K[k])
    chosen = token_targets(p.params, p.recording.out_TD[pos], _token(graph, k))
    return RowTargets(
        layer_R=np.array([graph.n_layers], np.int32),
        pos_R=np.array([pos], np.int32),
        read_RD=target_reads(p.params, p.recording, chosen.vec_KD, pos),
    )


class TokenRows(NamedTuple):
    """What all nodes do to the logits of X tokens at the last position, [X, N]."""

    edge_XN: np.ndarray  # as rows of the graph have it
    last_norm_XN: np.ndarray  # the same with the last norm live, to first order
    derivative_XN: np.ndarray  # in the model itself, see `model_derivative`


def token_rows(graph: Graph, token_X: np.ndarray, p: Recorded) -> TokenRows:
    """Rows of tokens, targets of the graph or not.

    Args:
      graph: traced.
      token_X: tokens, int32.
      p: the graph's prompt, recorded.
    """
    pos, X = graph.n_tokens - 1, len(token_X)
    out_D = p.recording.out_TD[pos]
    asked = Prompt(
        p.params,
        p.recording,
        graph_active(graph, p.active),
        token_targets(p.params, out_D, jnp.asarray(token_X), pos=pos),
        cfg=p.cfg,
        error_LTD=p.error_LTD,
    )
    rows = asked.target_rows()
    read_XD = past_final_norm(asked, rows.read_RD, rows.pos_R)
    both = rows.followed_by(dataclasses.replace(rows, read_RD=read_XD))
    edge_RN = np.zeros((2 * X, Columns(asked).layout.n_columns), read_XD.dtype)
    plan = Plan(band_end=(len(p.recording.token_T),), capacities=(1,))
    edge_rows(make_puller(asked, plan=plan, mesh=None), both, edge_RN)
    return TokenRows(edge_RN[:X], edge_RN[X:], model_derivative(asked))


def _token(graph: Graph, k: int) -> Array:
    """The token that is a target, [1]."""
    token = int(graph.target_token_K[k])
    if token < 0:
        raise InputError(
            "this target is a direction that the file does not hold: only features and "
            "tokens can be followed with the model"
        )
    return jnp.asarray([token])


def _answering(
    graph: Graph, row: int, p: Recorded, dictionary: Dictionary
) -> RowTargets:
    """What one row reads, and what norms and gates add to it."""
    k = row - graph.n_features
    token_1 = jnp.zeros(1, int) if k < 0 else _token(graph, k)
    out_D = p.recording.out_TD[graph.n_tokens - 1]
    # A prompt with this feature alone, or without any: its first row is the one.
    alone = Prompt(
        p.params,
        p.recording,
        p.active.where(np.arange(graph.n_features) == row),
        token_targets(p.params, out_D, token_1),
        cfg=p.cfg,
        error_LTD=p.error_LTD,
    )
    return answering_rows(alone, dictionary).take(np.zeros(1, int))


_LISTED = 5  # heads of a side


def _response(
    p: Recorded, row: RowTargets, column: int, value: float, *, past_norm: bool
) -> EdgeResponse:
    """Parts of an edge's response, its queries and keys by head."""
    states, gated_1 = rows_in_parts(row)
    size = len(STATES), 1, Columns(p).layout.n_columns
    state_Q1N = np.zeros(size, row.read_RD.dtype)
    plan = Plan(band_end=(len(p.recording.token_T),), capacities=(1,))
    way = live_parts(p, past_norm=past_norm)
    edge_rows(make_puller(p, plan=plan, mesh=None, way=way), states, state_Q1N)
    part_Q1 = split_parts(state_Q1N[:, :, column], np.array([value]), gated_1)
    sizes = dict(zip(EFFECT_PARTS, part_Q1[:, 0].tolist(), strict=True))
    sides = head_routes(p, summed(row), column, past_norm=past_norm)
    query_heads, key_heads = map(_strongest, sides)
    return EdgeResponse(
        total=float(state_Q1N[0, 0, column]),
        query_heads=query_heads,
        key_heads=key_heads,
        **{part: sizes[part] for part in PARTS},
    )


def _strongest(part_LH: np.ndarray) -> tuple[tuple[int, int, float], ...]:
    """Layer, number and part of the heads with the largest parts."""
    order = np.argsort(-np.abs(part_LH), axis=None, kind="stable")[:_LISTED]
    layer_J, head_J = np.unravel_index(order, part_LH.shape)
    found = zip(layer_J.tolist(), head_J.tolist(), strict=True)
    return tuple((l, h, float(part_LH[l, h])) for l, h in found if part_LH[l, h])


def inhibition(
    graph: Graph,
    model: Model,
    dictionary: Dictionary,
    *,
    margin: float = math.inf,
    limit: int | None = 4096,
) -> Inhibition:
    """Features that one active feature alone keeps from firing on a graph's prompt.

    Args:
      graph: traced.
      model: it was traced with.
      dictionary: it was traced with.
      margin: how far below its threshold a feature may be, in units of pre-activation.
      limit: most such features, the closest ones; None for no limit.

    Raises:
      InputError: for a dictionary without thresholds, or not the graph's.
    """
    check_thresholds(dictionary, model.params, model.cfg)
    p = recorded(graph, model, dictionary)
    return find_inhibition(p, dictionary, margin=margin, limit=limit)
