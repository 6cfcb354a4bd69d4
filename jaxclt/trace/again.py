"""What the model of a traced prompt can still say about its graph, on demand.

The prompt is recorded again, which takes a fraction of a second, and only the rows or
columns that are asked for are computed. Graphs keep what is cheap for all edges.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.coder import Dictionary
from jaxclt.errors import InputError, check_at_least
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.explain import EdgeParts, edge_parts
from jaxclt.graph.graph import Graph
from jaxclt.graph.heads import head_loadings
from jaxclt.graph.inhibition import Inhibition, check_thresholds, find_inhibition
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.provenance import graph_active, hop_spectrum
from jaxclt.graph.target_reads import target_reads
from jaxclt.graph.targets import token_targets
from jaxclt.io.model import Model
from jaxclt.trace.record import recorded

__all__ = ["edge_parts_with_model", "inhibition", "target_row"]


def edge_parts_with_model(
    graph: Graph,
    source: str,
    target: str,
    *,
    model: Model,
    dictionary: Dictionary,
    max_hops: int = 3,
) -> EdgeParts:
    """`edge_parts` with its hops, and its heads even if the graph does not list them.

    Raises:
      InputError: if there is no such edge, the graph is not from this model, or
        `max_hops` is below 1.
    """
    check_at_least(1, max_hops=max_hops)
    max_hops = min(max_hops, model.cfg.n_layers)  # a path passes no more heads
    parts = edge_parts(graph, source, target)
    with jax.default_matmul_precision("highest"):
        p = recorded(graph, model, dictionary)
        p = dataclasses.replace(p, active=graph_active(graph, p.active))
        rows = _row(graph, parts.row, p)
        hop_Q = hop_spectrum(p, rows, max_hops=max_hops)[:, 0, parts.col]
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
    )
    if parts.heads is None:
        only = np.zeros(1, np.int64), np.array([parts.col])
        loads = head_loadings(p, rows, *only)
        parts = dataclasses.replace(
            parts, heads=loads.listed(0), other_heads=float(loads.rest_E[0])
        )
    return parts


def _row(graph: Graph, row: int, p: Recorded) -> RowTargets:
    """What one row reads."""
    nodes = p.active
    if row < graph.n_features:
        at = np.array([row])
        return RowTargets(
            layer_R=nodes.layer_A[at], pos_R=nodes.pos_A[at], read_RD=nodes.reads(at)
        )
    return target_row(graph, row - graph.n_features, p)


def target_row(graph: Graph, k: int, p: Recorded) -> RowTargets:
    """What a target of a graph reads.

    Args:
      graph: traced.
      k: which of its targets.
      p: the graph's prompt, recorded.

    Raises:
      InputError: for a direction, which no file holds.
    """
    token, pos = int(graph.target_token_K[k]), int(graph.target_pos_K[k])
    if token < 0:
        raise InputError(
            "this target is a direction that the file does not hold: only features and "
            "tokens can be followed with the model"
        )
    chosen = token_targets(p.params, p.recording.out_TD[pos], jnp.asarray([token]))
    return RowTargets(
        layer_R=np.array([graph.n_layers], np.int32),
        pos_R=np.array([pos], np.int32),
        read_RD=target_reads(p.params, p.recording, chosen.vec_KD, pos),
    )


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
