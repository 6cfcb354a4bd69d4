"""From a recorded prompt and its active features to the attribution graph.

The shell of the room: it packs the sources, decides which rows to compute and in what
order, calls the pure parts, and assembles the `Graph`. The only place of the room that
loops on the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxclt.clt.active import Active
from jaxclt.errors import InputError
from jaxclt.graph.bank import SourceBank, source_bank
from jaxclt.graph.explore import arrived_influence, next_features
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.influence import solve_influence
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
from jaxclt.graph.targets import (
    place_targets,
    target_bias,
    target_readouts,
    target_rows,
    written_edges,
)
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
    chunk_size: int = 128  # most targets pulled back together
    n_bands: int | None = None  # position bands, one compilation each; None: chosen
    rows_per_update: int | None = None  # between two rankings; None: a quarter or 512


@dataclasses.dataclass
class Timing:
    """Seconds spent, for the report; filled in by the shell."""

    attribute: float = 0.0
    influence: float = 0.0
    prune: float = 0.0


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
      targets: what to explain, see `jaxclt.graph.targets`.
      cfg: model shape.
      meta: where it all comes from.
      config: how much to compute.
      n_tokens: length of the prompt if the recording is padded beyond it.
      on_rows: progress, called with (rows done, rows planned).
      timing: filled in if given.

    Raises:
      InputError: if an error node is not finite (NaN weights), or a target does not
        fit the model or the prompt.
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
        targets = place_targets(targets, cfg=cfg, n_tokens=n_tokens)
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
        target_prob_K=np.asarray(targets.weight_K),
        target_layer_K=np.asarray(targets.layer_K),
        target_pos_K=np.asarray(targets.pos_K),
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
    return dataclasses.replace(graph, pruning=pruning)


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
        self.target_rows = target_rows(params, recording, active, targets)
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
        a, is_target = self.active, feature < 0
        layer, pos = np.empty((2, len(feature)), np.int32)
        read = np.empty((len(feature), self.cfg.d_model), self.edge_RN.dtype)
        chosen = feature[~is_target]
        layer[~is_target], pos[~is_target] = a.layer_A[chosen], a.pos_A[chosen]
        read[~is_target] = a.reads(chosen)
        targets = self.target_rows.take(-1 - feature[is_target])
        layer[is_target], pos[is_target] = targets.layer_R, targets.pos_R
        read[is_target] = targets.read_RD
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
        self.add_written(edge_RN, feature, self.active)
        self.feature_R[start : start + n] = feature
        self.done += n

    def add_written(
        self, out_RN: np.ndarray, feature: np.ndarray, active: Active
    ) -> None:
        """Add to rows of targets what they read of an MLP's output themselves."""
        for row in np.flatnonzero(feature < 0):
            k = -1 - int(feature[row])
            if np.asarray(self.targets.write_KD)[k].any():
                out_RN[row] += written_edges(
                    active, self.bank.error_LTD, self.targets, k, n_tokens=self.T
                )

    def explore(self, on_rows: Callable[[int, int], None]) -> np.ndarray:
        """Compute the targets' rows, then features' until a limit; those features."""
        target = -1 - np.arange(self.K)
        if self.n_selected == self.A and self.config.tolerance <= 0:
            selected = np.arange(self.A)
            self.compute(np.concatenate([selected, target]), on_rows)
            return selected
        self.compute(target, on_rows)
        open_A = np.ones(self.A, bool)
        weight_K = np.asarray(self.targets.weight_K, np.float64)
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

    def assemble(self, selected: np.ndarray) -> dict[str, np.ndarray]:
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
        readout_K = target_readouts(self.recording, self.targets)
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
            "readout_R": np.concatenate([a.preact_A[selected], readout_K]),
        }

    def _bias(self, bias: Reads, selected: np.ndarray) -> np.ndarray:
        """The constant part of every row's readout."""
        a = self.active
        mid_AD = np.asarray(bias.mid_LTD)[a.layer_A[selected], a.pos_A[selected]]
        constant_A = (a.reads(selected) * mid_AD).sum(1) + a.read_bias_A[selected]
        constant_K = target_bias(a, bias, self.targets, self.target_rows)
        return np.concatenate([constant_A, constant_K])
