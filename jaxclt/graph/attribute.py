"""From a recorded prompt and its active features to the attribution graph.

The shell of the room: computed edges, influence, pruning and provenance make a `Graph`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.active import Active
from jaxclt.errors import InputError
from jaxclt.graph.compute import compute_edges
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.head_table import add_rows, only_columns
from jaxclt.graph.heads import head_loadings, strongest_kept
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.prompt import Chooser, Computed, Prompt
from jaxclt.graph.provenance import direct_edges
from jaxclt.graph.prune import prune
from jaxclt.graph.shares import shares_total
from jaxclt.graph.target_reads import target_bias, target_readouts
from jaxclt.graph.targets import place_targets
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import bias_reads
from jaxclt.replacement.errors import error_nodes
from jaxclt.types import LMParams, Recording, Targets

__all__ = ["AttributeConfig", "Timing", "attribute_recording"]


@dataclasses.dataclass
class Timing:
    """Seconds spent and work done, for the report; filled in by the shell."""

    attribute: float = 0.0
    influence: float = 0.0
    prune: float = 0.0
    provenance: float = 0.0
    work: dict[str, Any] = dataclasses.field(default_factory=dict)


def attribute_recording(
    params: LMParams,
    recording: Recording,
    active: Active,
    targets: Targets,
    *,
    cfg: LMConfig,
    meta: GraphMeta,
    config: AttributeConfig | None = None,
    n_tokens: int | None = None,
    shortlist: Chooser | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    timing: Timing | None = None,
) -> Graph:
    """The attribution graph of a recorded prompt.

    Args:
      params: the model.
      recording: its clean pass on the prompt.
      active: the dictionary's active features on it.
      targets: what to explain, see `jaxclt.graph.targets`.
      cfg: model shape.
      meta: where it all comes from.
      config: how much to compute.
      n_tokens: length of the prompt if the recording is padded beyond it.
      shortlist: chooses the features that may be nodes; None for all.
      on_rows: progress, called with (rows done, rows planned).
      stop: asked after every chunk of rows; once true, the graph is of the features
        attributed so far, everything else counted as unexplored.
      timing: filled in if given.

    Raises:
      KeyboardInterrupt: if stopped where there is no graph yet: before the first
        features' rows, or when sources are pushed forward.
      InputError: if the model is in half precision, an error node is not finite (NaN
        weights), or a target does not fit the model or the prompt.
    """
    if params.embed_VD.dtype.itemsize < 4:
        raise InputError(
            f"attribution needs float32, the model is {params.embed_VD.dtype}: load it "
            "with --dtype float32, whatever its files hold"
        )
    config = config or AttributeConfig()
    timing = timing or Timing()
    start = time.perf_counter()
    with jax.default_matmul_precision(config.precision):
        if config.convention == "circuit-tracer":
            # That tool gives the first position (BOS) no features; what they wrote
            # stays, as part of the error there, which is no node either.
            active = active.where(active.pos_A > 0)
        n_tokens = n_tokens or len(recording.token_T)
        targets = place_targets(targets, cfg=cfg, n_tokens=n_tokens)
        if n_tokens < len(recording.token_T):
            active = active.where(active.pos_A < n_tokens)
        error_LTD = error_nodes(active, recording)
        if not np.isfinite(error_LTD).all():
            raise InputError(
                "the dictionary's reconstruction is not finite on this prompt: check "
                "its weights for NaN or overflow"
            )
        prompt = Prompt(
            params=params,
            recording=recording,
            active=active,
            error_LTD=error_LTD,
            targets=targets,
            cfg=cfg,
            config=config,
            n_tokens=n_tokens,
            shortlist=shortlist,
            stop=stop,
        )
        found = compute_edges(prompt, on_rows)
        timing.work = found.work
        parts = _assemble(prompt, found)
    timing.attribute = time.perf_counter() - start
    start = time.perf_counter()
    graph = Graph(
        meta=dataclasses.replace(meta, convention=config.convention),
        token_T=np.asarray(recording.token_T, np.int32)[:n_tokens],
        target_token_K=np.asarray(targets.token_K, np.int32),
        target_prob_K=np.asarray(targets.weight_K),
        target_layer_K=np.asarray(targets.layer_K),
        target_pos_K=np.asarray(targets.pos_K),
        influence_N=np.zeros(parts["edge_RN"].shape[1]),
        pruning=_no_pruning(parts["edge_RN"].shape),
        **parts,
    )
    influence_N = solve_influence(
        graph.edge_RN, shares_total(graph), graph.target_prob_K
    )
    graph = dataclasses.replace(graph, influence_N=influence_N)
    timing.influence = time.perf_counter() - start
    start = time.perf_counter()
    pruning = prune(
        graph,
        node_threshold=config.node_threshold,
        edge_threshold=config.edge_threshold,
    )
    timing.prune = time.perf_counter() - start
    graph = dataclasses.replace(graph, pruning=pruning)
    start = time.perf_counter()
    graph = _with_provenance(prompt, graph, found.selected)
    timing.provenance = time.perf_counter() - start
    return graph


def _with_provenance(p: Prompt, graph: Graph, selected: np.ndarray) -> Graph:
    """The graph with its edges' residual-direct parts, and heads if asked for."""
    keep_A = np.zeros(len(p.active.layer_A), bool)
    keep_A[selected] = True
    nodes, T = p.active.where(keep_A), p.n_tokens
    rows = p.feature_rows(selected).followed_by(p.target_rows())
    error_LTD = p.error_LTD[:, :T]
    embed_TD = np.asarray(p.recording.embed_TD)[:T]
    direct_RN = direct_edges(nodes, error_LTD, embed_TD, rows)
    own = dataclasses.replace(p, active=nodes).written()
    if own_rows := {len(selected) + k: edge_N for k, edge_N in own}:
        direct_RN = add_rows(direct_RN, own_rows)
    is_node_N = np.ones(graph.edge_RN.shape[1], bool)
    is_node_N[p.ignored_columns(len(selected))] = False
    graph = dataclasses.replace(graph, direct_RN=only_columns(direct_RN, is_node_N))
    if p.config.heads <= 0:
        return graph
    heads = head_loadings(
        p.params,
        p.recording,
        nodes,
        p.error_LTD,
        rows,
        *strongest_kept(graph, p.config.heads),
        cfg=p.cfg,
        n_tokens=T,
        direct=graph.direct_RN,
    )
    return dataclasses.replace(graph, heads=heads)


_bias_reads = jax.jit(bias_reads, static_argnames="cfg")


def _no_pruning(shape: tuple[int, int]) -> Pruning:
    return Pruning(
        keep_N=np.ones(shape[1], bool),
        keep_edge_RN=np.ones((1, 1), bool),
        node_threshold=1.0,
        edge_threshold=1.0,
    )


def _assemble(p: Prompt, found: Computed) -> dict[str, Any]:
    """The graph's arrays, what the rows sum to beside their edges included."""
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
    return {
        "layer_A": a.layer_A[selected].astype(np.int32),
        "pos_A": a.pos_A[selected].astype(np.int32),
        "feature_A": a.feature_A[selected].astype(np.int32),
        "value_A": a.value_A[selected],
        "preact_A": a.preact_A[selected],
        "attributed_R": np.ones(len(found.edge_RN), bool),
        "edge_RN": found.edge_RN,
        "bias_R": np.concatenate([constant_A, constant_K]),
        "rest_R": found.rest_R,
        "rest_abs_R": found.rest_abs_R,
        "readout_R": np.concatenate([a.preact_A[selected], readout_K]),
    }
