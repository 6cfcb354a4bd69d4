"""From a recorded prompt and its active features to the attribution graph.

The shell of the room: it packs the sources, decides which rows to compute and in what
order, calls the pure parts, and assembles the `Graph`. The only place of the room that
loops on the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.active import Active
from jaxclt.errors import InputError
from jaxclt.graph.bank import SourceBank, source_bank
from jaxclt.graph.explore import arrived_influence, next_features
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.head_table import only_columns
from jaxclt.graph.heads import head_loadings, strongest_kept
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.provenance import direct_edges
from jaxclt.graph.prune import prune
from jaxclt.graph.rows import (
    Plan,
    RowTargets,
    edge_rows,
    make_plan,
    make_stream,
    pull_flops,
)
from jaxclt.graph.scores import shares_total
from jaxclt.graph.targets import target_reads
from jaxclt.lm.config import LMConfig
from jaxclt.lm.frozen import bias_reads
from jaxclt.replacement.errors import error_nodes
from jaxclt.types import LMParams, Reads, Recording, Targets

__all__ = ["AttributeConfig", "Timing", "attribute_recording"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeConfig:
    """How much of a graph to compute, and how."""

    max_features: int | None = 8192  # most feature nodes; None: every active feature
    tolerance: float = 0.0  # stop when less influence than this is unexplored
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    convention: Literal["paper", "circuit-tracer"] = "paper"
    precision: str = "highest"  # of matmuls; accelerators default to less than float32
    heads: int = 0  # list the last heads of this many of the strongest kept edges
    chunk_size: int = 128  # most targets pulled back together
    n_bands: int | None = None  # position bands, one compilation each; None: chosen
    rows_per_update: int | None = None  # between two rankings; None: a quarter or 512


@dataclasses.dataclass
class Timing:
    """Seconds spent, for the report; filled in by the shell."""

    attribute: float = 0.0
    influence: float = 0.0
    prune: float = 0.0
    provenance: float = 0.0


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
    on_rows: Callable[[int, int], None] = lambda done, total: None,
    timing: Timing | None = None,
) -> Graph:
    """The attribution graph of a recorded prompt.

    Args:
      params: the model.
      recording: its clean pass on the prompt.
      active: the dictionary's active features on it.
      targets: what to explain.
      cfg: model shape.
      meta: where it all comes from.
      config: how much to compute.
      n_tokens: length of the prompt if the recording is padded beyond it.
      on_rows: progress, called with (rows done, rows planned).
      timing: filled in if given.

    Raises:
      InputError: if an error node is not finite (NaN weights).
    """
    config = config or AttributeConfig()
    timing = timing or Timing()
    start = time.perf_counter()
    with jax.default_matmul_precision(config.precision):
        if config.convention == "circuit-tracer":
            # That tool gives the first position (BOS) no features; what they wrote
            # stays, as part of the error there, which is no node either.
            active = active.where(active.pos_A > 0)
        n_tokens = n_tokens or len(recording.token_T)
        if n_tokens < len(recording.token_T):
            active = active.where(active.pos_A < n_tokens)
        error_LTD = error_nodes(active, recording)
        if not np.isfinite(error_LTD).all():
            raise InputError(
                "the dictionary's reconstruction is not finite on this prompt: check "
                "its weights for NaN or overflow"
            )
        rows = _Rows(
            params, recording, active, error_LTD, targets, cfg, config, n_tokens
        )
        explored_A = rows.explore(on_rows)
        parts = rows.assemble(explored_A)
    timing.attribute = time.perf_counter() - start
    start = time.perf_counter()
    graph = Graph(
        meta=dataclasses.replace(meta, convention=config.convention),
        token_T=np.asarray(recording.token_T, np.int32)[:n_tokens],
        target_token_K=np.asarray(targets.token_K, np.int32),
        target_prob_K=np.asarray(targets.prob_K),
        influence_N=np.zeros(parts["edge_RN"].shape[1]),
        pruning=_no_pruning(parts["edge_RN"].shape),
        **parts,
    )
    found = solve_influence(graph.edge_RN, shares_total(graph), graph.target_prob_K)
    graph = dataclasses.replace(graph, influence_N=found)
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
    graph = rows.provenance(graph, explored_A)
    timing.provenance = time.perf_counter() - start
    return graph


_bias_reads = jax.jit(bias_reads, static_argnames="cfg")


def _no_pruning(shape: tuple[int, int]) -> Pruning:
    return Pruning(
        keep_N=np.ones(shape[1], bool),
        keep_edge_RN=np.ones((1, 1), bool),
        node_threshold=1.0,
        edge_threshold=1.0,
    )


class _Rows:
    """Rows of one prompt: computed on demand, kept in the order of computation."""

    def __init__(
        self,
        params: LMParams,
        recording: Recording,
        active: Active,
        error_LTD: np.ndarray,
        targets: Targets,
        cfg: LMConfig,
        config: AttributeConfig,
        n_tokens: int,
    ) -> None:
        self.params, self.recording, self.active = params, recording, active
        self.targets, self.cfg, self.config = targets, cfg, config
        self.error_LTD = error_LTD
        L, T = len(error_LTD), n_tokens
        self.L, self.T, self.A = L, T, len(active.layer_A)
        self.K = len(targets.token_K)
        self.is_node_N = np.ones(self.A + L * T + T, bool)
        if config.convention == "circuit-tracer":
            self.is_node_N[self.A : self.A + L * T : T] = False
        cap = self.A if config.max_features is None else config.max_features
        self.n_selected = min(self.A, cap)
        self.bank: SourceBank = source_bank(
            active, error_LTD, np.asarray(recording.embed_TD)
        )
        self.stream = make_stream(params, recording, self.bank, skip=active.skip)
        n_rows = self.n_selected + self.K
        self.edge_RN = np.zeros((n_rows, self.A + L * T + T), error_LTD.dtype)
        self.total_R = np.zeros(n_rows)
        self.feature_R = np.full(n_rows, self.A, np.int64)  # A: not computed
        self.done = 0
        self.plan = self._plan()

    def _plan(self) -> Plan:
        """One plan for all rows of the prompt, so that nothing compiles twice."""
        return make_plan(
            self.n_selected + self.K,
            n_positions=len(self.recording.token_T),
            flops_per_position=pull_flops(self.cfg, self.bank),
            n_bands=self.config.n_bands,
            chunk_size=self.config.chunk_size,
        )

    def read(self, feature: np.ndarray) -> RowTargets:
        """Directions of features, and of target k given as -1 - k."""
        a, last = self.active, self.T - 1
        is_target = feature < 0
        layer = np.full(len(feature), self.L, np.int32)
        pos = np.full(len(feature), last, np.int32)
        read = np.empty((len(feature), self.cfg.d_model), self.edge_RN.dtype)
        chosen = feature[~is_target]
        layer[~is_target], pos[~is_target] = a.layer_A[chosen], a.pos_A[chosen]
        read[~is_target] = a.reads(chosen)
        read_KD = target_reads(self.params, self.recording, self.targets.vec_KD, last)
        read[is_target] = read_KD[-1 - feature[is_target]]
        return RowTargets(layer_R=layer, pos_R=pos, read_RD=read)

    def compute(self, feature: np.ndarray, on_rows: Callable[[int, int], None]) -> None:
        """Append the rows of some features (or of all targets)."""
        start, n = self.done, len(feature)
        finished = start

        def report(count: int) -> None:
            nonlocal finished
            finished += count
            on_rows(finished, len(self.edge_RN))

        edge_RN = self.edge_RN[start : start + n]
        edge_rows(
            self.stream,
            self.bank,
            self.read(feature),
            edge_RN,
            cfg=self.cfg,
            plan=self.plan,
            source_pos_A=self.active.pos_A,
            on_rows=report,
        )
        self.feature_R[start : start + n] = feature
        self.done += n

    def explore(self, on_rows: Callable[[int, int], None]) -> np.ndarray:
        """Compute the targets' rows, then features' until a limit; those features."""
        target = -1 - np.arange(self.K)
        if self.n_selected == self.A and self.config.tolerance <= 0:
            selected = np.arange(self.A)
            self.compute(np.concatenate([selected, target]), on_rows)
            return selected
        self.compute(target, on_rows)
        open_A = np.ones(self.A, bool)
        weight_K = np.asarray(self.targets.prob_K, np.float64)
        weight_K = weight_K / weight_K.sum()
        # Many rows at once make chunks that are narrow in layer, hence cheap.
        at_once = self.config.rows_per_update or max(512, -(-self.n_selected // 4))
        known = 0
        while self.done < len(self.edge_RN):
            new = slice(known, self.done)
            self.total_R[new] = np.abs(self.edge_RN[new]) @ self.is_node_N
            known = self.done
            visit_A = arrived_influence(
                self.edge_RN[: self.done],
                self.total_R[: self.done],
                self.feature_R[: self.done],
                weight_K,
                self.active.layer_A,
            )
            n = min(at_once, len(self.edge_RN) - self.done)
            chosen, unexplored = next_features(visit_A, open_A, n)
            if unexplored <= self.config.tolerance:
                break
            self.compute(chosen, on_rows)
            open_A[chosen] = False
        return np.sort(self.feature_R[: self.done][self.feature_R[: self.done] >= 0])

    def assemble(self, selected: np.ndarray) -> dict[str, Any]:
        """Rows and columns of the selected features; everything else summed in rest."""
        A = self.A
        done = self.feature_R[: self.done]
        # Features in order, then targets (-1 - k) in order.
        order = np.lexsort((np.abs(done), done < 0))
        keep_N = self.is_node_N.copy()
        keep_N[:A] = False
        keep_N[selected] = True
        edge_RN = self.edge_RN[: self.done]
        if not (order == np.arange(len(order))).all():
            edge_RN = edge_RN[order]
        rest = edge_RN[:, ~keep_N]
        if len(selected) < A:
            columns = np.concatenate([selected, np.arange(A, edge_RN.shape[1])])
            edge_RN, keep_N = edge_RN[:, columns], keep_N[columns]
        # Dropped errors stay columns of the layout, empty, so that offsets are plain.
        if not keep_N.all():
            edge_RN[:, ~keep_N] = 0
        bias = _bias_reads(
            self.params,
            self.recording.frozen,
            jnp.broadcast_to(
                jnp.asarray(self.active.write_bias_LD)[:, None, :],
                self.recording.mid_LTD.shape,
            ),
            cfg=self.cfg,
            skip=self.active.skip,
        )
        a = self.active
        vec_KD = np.asarray(self.targets.vec_KD)
        return {
            "layer_A": a.layer_A[selected].astype(np.int32),
            "pos_A": a.pos_A[selected].astype(np.int32),
            "feature_A": a.feature_A[selected].astype(np.int32),
            "value_A": a.value_A[selected],
            "preact_A": a.preact_A[selected],
            "attributed_R": np.ones(len(order), bool),
            "edge_RN": edge_RN,
            "bias_R": self._bias(bias, selected),
            "rest_R": rest.sum(1),
            "rest_abs_R": np.abs(rest).sum(1),
            "readout_R": np.concatenate(
                [
                    a.preact_A[selected],
                    vec_KD @ np.asarray(self.recording.out_TD)[self.T - 1],
                ]
            ),
        }

    def provenance(self, graph: Graph, selected: np.ndarray) -> Graph:
        """The graph with its edges' residual-direct parts, and heads if asked for."""
        nodes, T = self.active.where(selected), self.T
        target = self.read(np.concatenate([selected, -1 - np.arange(self.K)]))
        embed_TD = np.asarray(self.recording.embed_TD)[:T]
        direct_RN = direct_edges(nodes, self.error_LTD[:, :T], embed_TD, target)
        is_node_N = np.concatenate(
            [np.ones(len(selected), bool), self.is_node_N[self.A :]]
        )
        graph = dataclasses.replace(graph, direct_RN=only_columns(direct_RN, is_node_N))
        if self.config.heads <= 0:
            return graph
        heads = head_loadings(
            self.params,
            self.recording,
            nodes,
            self.error_LTD,
            target,
            *strongest_kept(graph, self.config.heads),
            cfg=self.cfg,
            n_tokens=T,
            direct=graph.direct_RN,
        )
        return dataclasses.replace(graph, heads=heads)

    def _bias(self, bias: Reads, selected: np.ndarray) -> np.ndarray:
        """The constant part of every row's readout."""
        a = self.active
        mid_AD = np.asarray(bias.mid_LTD)[a.layer_A[selected], a.pos_A[selected]]
        constant_A = (a.reads(selected) * mid_AD).sum(1) + a.read_bias_A[selected]
        out_D = np.asarray(bias.out_TD)[self.T - 1]
        return np.concatenate([constant_A, np.asarray(self.targets.vec_KD) @ out_D])
