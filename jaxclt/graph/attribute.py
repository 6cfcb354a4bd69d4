"""From a recorded prompt and its active features to the attribution graph.

The shell of the room: computed edges, influence, pruning and provenance make a `Graph`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclt.graph.compute import compute_edges
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.derivative import model_derivative
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.head_table import add_rows, only_columns
from jaxclt.graph.heads import head_loadings, strongest_kept
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.prompt import Computed, Prompt
from jaxclt.graph.provenance import direct_edges
from jaxclt.graph.prune import prune
from jaxclt.graph.respond import respond
from jaxclt.graph.shares import shares_total
from jaxclt.graph.target_reads import target_bias, target_readouts
from jaxclt.lm.frozen import bias_reads
from jaxclt.precision import at_precision, jit

__all__ = ["AttributeConfig", "Timing", "attribute_recording"]


@dataclasses.dataclass
class Timing:
    """Seconds spent by stage and work done, for the report; filled in by the shell."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    work: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether memory was planned for source vectors written out."""
        return self.work.get("sources") != "gathered"

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def attribute_recording(
    p: Prompt,
    meta: GraphMeta,
    *,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    timing: Timing | None = None,
) -> Graph:
    """The attribution graph of a recorded prompt.

    Args:
      p: the prompt, and what is asked of it.
      meta: where it all comes from.
      on_rows: progress, called with (rows done, rows planned).
      timing: filled in if given.

    Raises:
      KeyboardInterrupt: if stopped where there is no graph yet: before the first
        features' rows, or when sources are pushed forward.
    """
    timing, done = timing or Timing(), 0
    more = p.n_selected + p.n_targets if p.config.response else 0

    def of_all(rows: int, planned: int) -> None:
        nonlocal done
        done = rows
        on_rows(rows, planned + more)

    with timing.of("attribute"), at_precision(p.config.precision):
        found = compute_edges(p, of_all)
        timing.work = found.work
        graph = _assemble(p, meta, found)
    with timing.of("influence"):
        influence_N = solve_influence(
            graph.edge_RN, shares_total(graph), graph.target_prob_K
        )
        graph = dataclasses.replace(graph, influence_N=influence_N)
    with timing.of("prune"):
        pruning = prune(
            graph,
            node_threshold=p.config.node_threshold,
            edge_threshold=p.config.edge_threshold,
        )
        graph = dataclasses.replace(graph, pruning=pruning)
    keep_A = np.zeros(len(p.active.layer_A), bool)
    keep_A[found.selected] = True
    nodes = dataclasses.replace(p, active=p.active.where(keep_A))
    if p.config.response and not p.stop():
        with timing.of("response"), at_precision(p.config.precision):
            response = respond(
                p,
                nodes,
                graph,
                found.selected,
                lambda rows, planned: on_rows(done + rows, done + planned),
                timing.work,
            )
            graph = dataclasses.replace(graph, response=response)
    if p.config.response and graph.response is None:
        timing.work["stopped"] = True
    with timing.of("provenance"):
        graph = _with_provenance(nodes, graph)
    with timing.of("derivative"), at_precision(p.config.precision):
        derivative_KN = model_derivative(nodes, packed=timing.packed)
    return dataclasses.replace(graph, derivative_KN=derivative_KN)


def _with_provenance(nodes: Prompt, graph: Graph) -> Graph:
    """The graph with its edges' residual-direct parts, and heads if asked for."""
    rows = nodes.all_rows()
    direct_RN = direct_edges(nodes, rows)
    if own_rows := {graph.n_features + k: edge_N for k, edge_N in nodes.written()}:
        direct_RN = add_rows(direct_RN, own_rows)
    is_node_N = np.ones(graph.edge_RN.shape[1], bool)
    is_node_N[nodes.ignored_columns(graph.n_features)] = False
    graph = dataclasses.replace(graph, direct_RN=only_columns(direct_RN, is_node_N))
    if nodes.config.heads <= 0:
        return graph
    edges = strongest_kept(graph, nodes.config.heads)
    heads = head_loadings(nodes, rows, *edges, direct=graph.direct_RN)
    return dataclasses.replace(graph, heads=heads)


_bias_reads = jit(bias_reads, static_argnames="cfg")


def _assemble(p: Prompt, meta: GraphMeta, found: Computed) -> Graph:
    """The graph, what its rows sum to beside their edges included; not pruned yet."""
    a, selected = p.active, found.selected
    bias = _bias_reads(
        p.params,
        p.recording.frozen,
        jnp.broadcast_to(
            jnp.asarray(a.write_bias_LD)[:, None, :], p.recording.mid_LTD.shape
        ),
        cfg=p.cfg,
        skip=a.skip,
    )
    mid_AD = np.asarray(bias.mid_LTD)[a.layer_A[selected], a.pos_A[selected]]
    constant_A = (a.reads(selected) * mid_AD).sum(1) + a.read_bias_A[selected]
    constant_K = target_bias(a, bias, p.targets, p.target_rows())
    readout_K = target_readouts(p.recording, p.targets)
    R, N = found.edge_RN.shape
    return Graph(
        meta=dataclasses.replace(meta, convention=p.config.convention),
        token_T=np.asarray(p.recording.token_T, np.int32)[: p.n_tokens],
        layer_A=a.layer_A[selected].astype(np.int32),
        pos_A=a.pos_A[selected].astype(np.int32),
        feature_A=a.feature_A[selected].astype(np.int32),
        value_A=a.value_A[selected],
        preact_A=a.preact_A[selected],
        attributed_R=np.ones(R, bool),
        target_token_K=np.asarray(p.targets.token_K, np.int32),
        target_prob_K=np.asarray(p.targets.weight_K),
        target_layer_K=np.asarray(p.targets.layer_K),
        target_pos_K=np.asarray(p.targets.pos_K),
        edge_RN=found.edge_RN,
        bias_R=np.concatenate([constant_A, constant_K]),
        rest_R=found.rest_R,
        rest_abs_R=found.rest_abs_R,
        readout_R=np.concatenate([a.preact_A[selected], readout_K]),
        influence_N=np.zeros(N),
        pruning=Pruning(
            keep_N=np.ones(N, bool),
            keep_edge_RN=np.ones((1, 1), bool),
            node_threshold=1.0,
            edge_threshold=1.0,
        ),
    )
