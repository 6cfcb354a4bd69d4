"""Which edges of a prompt are computed, in what order and from which side.

Everything at once by pushing sources forward where that is cheaper and fits in memory;
else the targets' rows, then those of features in the order of their influence, until
the tolerance or the cap is reached. The only place of the room that loops on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclt.clt.active import Active
from jaxclt.errors import InputError
from jaxclt.graph.bank import Bank, RowTargets, pack, readers, writers
from jaxclt.graph.blocks import submatrix
from jaxclt.graph.columns import Columns, edge_columns, push_flops
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.explore import arrived_influence, next_features
from jaxclt.graph.memory import (
    FLOAT32,
    MemoryPlan,
    Sizes,
    available_bytes,
    host_available_bytes,
    memory_plan,
)
from jaxclt.graph.plan import Plan, make_plan, mean_flops
from jaxclt.graph.rows import Puller, edge_rows, make_puller, pull_flops, visits
from jaxclt.graph.targets import target_rows, written_edges
from jaxclt.lm.config import LMConfig
from jaxclt.types import LMParams, Recording, Targets

__all__ = [
    "Computed",
    "Prompt",
    "compute_edges",
    "memory_budget",
    "plan_attribution",
]


# Slots of the features to look at, ascending, from the active ones and the influence
# that arrives at them from the targets directly.
Chooser = Callable[[Active, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Everything the rows of one prompt are made of."""

    params: LMParams
    recording: Recording
    active: Active
    error_LTD: np.ndarray
    targets: Targets
    cfg: LMConfig
    config: AttributeConfig
    n_tokens: int
    shortlist: Chooser | None = None

    @property
    def n_selected(self) -> int:
        """Most features that get a row."""
        A, cap = len(self.active.layer_A), self.config.max_features
        return A if cap is None else min(A, cap)

    @property
    def n_targets(self) -> int:
        """K."""
        return len(self.targets.token_K)

    def ignored_errors(self) -> np.ndarray:
        """Errors, layer-major, that are no nodes: of that tool's first position."""
        every = np.arange(self.cfg.n_layers * self.n_tokens)
        ct = self.config.convention == "circuit-tracer"
        return every[:: self.n_tokens] if ct else every[:0]

    def target_weights(self) -> np.ndarray:
        """What influence starts with at each target; sums to 1."""
        weight_K = np.asarray(self.targets.weight_K, np.float64)
        return weight_K / weight_K.sum()

    def target_rows(self) -> RowTargets:
        """Directions of the targets."""
        return target_rows(self.params, self.recording, self.active, self.targets)

    def written(self) -> Iterator[tuple[int, np.ndarray]]:
        """Targets that read an MLP's output, with the edges to what writes it."""
        for k in np.flatnonzero(np.asarray(self.targets.write_KD).any(1)).tolist():
            edge_N = written_edges(
                self.active, self.error_LTD, self.targets, k, n_tokens=self.n_tokens
            )
            yield k, edge_N

    def feature_rows(self, feature: np.ndarray) -> RowTargets:
        """Directions of some features."""
        a = self.active
        return RowTargets(
            layer_R=a.layer_A[feature],
            pos_R=a.pos_A[feature],
            read_RD=a.reads(feature),
        )

    def all_rows(self) -> RowTargets:
        """Directions of all features, then of the targets."""
        features = self.feature_rows(np.arange(len(self.active.layer_A)))
        return features.followed_by(self.target_rows())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computed:
    """Rows of selected features, then of the targets."""

    selected: np.ndarray  # active features, ascending
    edge_RN: np.ndarray  # columns: selected features, errors, embeddings
    rest_R: np.ndarray  # what is no column, summed
    rest_abs_R: np.ndarray
    work: dict[str, Any]


def plan_attribution(
    active: Active,
    n_targets: int,
    *,
    cfg: LMConfig,
    params: LMParams,
    config: AttributeConfig,
    n_tokens: int,
) -> MemoryPlan:
    """What a prompt's graph will hold in memory, known before any row is computed.

    Raises:
      InputError: if it does not fit, with the bytes needed and the flags that lower it.
    """
    A, cap = len(active.layer_A), config.max_features
    spans = np.array([rows.shape[1] for rows in active.decoder])
    sizes = Sizes(
        cfg=cfg,
        n_tokens=n_tokens,
        n_active=A,
        n_rows=A if cap is None else min(A, cap),
        n_targets=n_targets,
        n_sites=float(spans[active.layer_A].mean()) if A else 1.0,
        n_unique=sum(len(rows) for rows in active.decoder),
        # A plan may be asked for a model in half precision, which no graph is made of.
        params_bytes=sum(
            leaf.size * max(leaf.dtype.itemsize, FLOAT32)
            for leaf in jax.tree.leaves(params)
        ),
        itemsize=max(active.value_A.itemsize, FLOAT32),
    )
    budget = memory_budget(config)
    if config.memory_gb is None:
        budget += sizes.params_bytes  # what is free does not count what is loaded
    apart = jax.local_devices()[0].platform != "cpu"
    return memory_plan(
        sizes,
        budget,
        chunk_size=config.chunk_size,
        n_devices=_mesh(config).size,
        host_budget=host_available_bytes() if apart else None,
    )


def memory_budget(config: AttributeConfig) -> int:
    """Bytes that may be used: as configured, else what is free now."""
    if config.memory_gb is None:
        return available_bytes()
    return int(config.memory_gb * 1e9)


def _mesh(config: AttributeConfig) -> Mesh:
    devices = jax.devices()
    # Several CPU devices share the same cores: splitting gains nothing.
    n_all = 1 if devices[0].platform == "cpu" else len(devices)
    n = n_all if config.devices is None else config.devices
    if not 1 <= n <= len(devices):
        raise InputError(f"devices {n}: this machine has {len(devices)}")
    return Mesh(np.array(devices[:n]), ("rows",))


def compute_edges(p: Prompt, on_rows: Callable[[int, int], None]) -> Computed:
    """All rows that are wanted, from the cheaper side."""
    config, T, K = p.config, len(p.recording.token_T), p.n_targets
    kept = p.recording.frozen.pattern_LHTS is not None
    memory = plan_attribution(
        p.active, K, cfg=p.cfg, params=p.params, config=config, n_tokens=T
    )
    mesh = _mesh(config)
    bank = pack(writers(p.active), T)
    plan = make_plan(
        p.n_selected + K,
        n_positions=T,
        flops_per_position=mean_flops(p.cfg, bank, T),
        n_bands=config.n_bands,
        chunk_size=memory.chunk_size,
        n_devices=mesh.size,
    )
    work: dict[str, Any] = {
        "chunk_size": plan.capacity,
        "bands": len(plan.band_end),
        "devices": mesh.size,
        "memory_gb": {k: round(v / 1e9, 3) for k, v in memory.bytes.items()},
        "patterns": "kept" if kept else "recomputed",
    }
    can_push = memory.full_matrix and kept and p.shortlist is None
    if config.direction == "push" and not can_push:
        raise InputError(
            "direction push computes every edge, which takes memory and leaves no room "
            "for a shortlist: use auto or pull"
        )
    if can_push and config.direction != "pull":
        push = _push_side(p)
        skip = p.active.skip is not None
        cost = push_flops(p.cfg, push.bank, plan, push.columns, skip=skip)
        rows = pull_flops(p.cfg, bank, plan, push.rows, skip=skip)
        rows *= (p.n_selected + K) / len(push.rows.pos_R)
        if config.direction == "push" or cost <= rows:
            work |= {"direction": "push", "tflop": cost / 1e12}
            return _push_all(p, push, plan, mesh, work, on_rows)
    puller = make_puller(
        p.params,
        p.recording,
        p.active,
        p.error_LTD,
        cfg=p.cfg,
        plan=plan,
        n_tokens=p.n_tokens,
        mesh=mesh,
        bank=bank,
        packed=memory.packed,
    )
    work |= {
        "direction": "pull",
        "sources": "packed" if memory.packed else "gathered",
        "pool": memory.pool,
    }
    return _pull_some(p, puller, memory.pool, work, on_rows)


# -- from the sources' side: everything at once ----------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PushSide:
    """All sources, all targets."""

    columns: Columns
    rows: RowTargets
    bank: Bank  # of the rows


def _push_side(p: Prompt) -> _PushSide:
    rows = p.all_rows()
    return _PushSide(
        columns=Columns(
            active=p.active,
            error_LTD=p.error_LTD[:, : p.n_tokens],
            embed_TD=np.asarray(p.recording.embed_TD)[: p.n_tokens],
        ),
        rows=rows,
        bank=pack(readers(rows, p.cfg.n_layers), len(p.recording.token_T)),
    )


def _push_all(
    p: Prompt,
    push: _PushSide,
    plan: Plan,
    mesh: Mesh,
    work: dict[str, Any],
    on_rows: Callable[[int, int], None],
) -> Computed:
    """Every edge, then the rows and columns of the most influential features."""
    A, N = len(p.active.layer_A), len(push.columns.sites)
    edge_RN = np.zeros((len(push.rows.pos_R), N), p.error_LTD.dtype)
    edge_columns(
        p.params,
        p.recording,
        push.columns,
        push.rows,
        push.bank,
        edge_RN,
        cfg=p.cfg,
        plan=plan,
        mesh=mesh,
        skip=p.active.skip,
        on_columns=_counted(on_rows, N),
    )
    for k, edge_N in p.written():
        edge_RN[A + k] += edge_N
    ignored = A + p.ignored_errors()
    selected = np.arange(A)
    if p.n_selected < A:
        visit_A = arrived_influence(
            edge_RN,
            _row_totals(edge_RN, ignored),
            np.concatenate([np.arange(A), -1 - np.arange(p.n_targets)]),
            p.target_weights(),
            p.active.layer_A,
        )
        selected, _ = next_features(visit_A, np.ones(A, bool), p.n_selected)
        edge_RN = edge_RN[np.concatenate([selected, np.arange(A, len(edge_RN))])]
    rest_R = np.zeros(len(edge_RN))
    rest_abs_R = rest_R.copy()
    edge_RN = _cut_columns(edge_RN, A, selected, ignored, rest_R, rest_abs_R)
    return Computed(
        selected=selected,
        edge_RN=edge_RN,
        rest_R=rest_R,
        rest_abs_R=rest_abs_R,
        work=work,
    )


def _counted(report: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """A progress callback for parts, from one for the whole."""
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        report(done, total)

    return count


def _row_totals(edge_RN: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Sum of the absolute edges of every row, without some columns."""
    # In blocks: the matrix may be large, and so would its absolute value.
    blocks = np.array_split(edge_RN, max(1, len(edge_RN) // 256))
    total_R = np.concatenate([np.abs(block).sum(1) for block in blocks])
    return total_R - np.abs(edge_RN[:, ignored]).sum(1)


def _cut_columns(
    edge_RN: np.ndarray,
    n_features: int,
    selected: np.ndarray,
    ignored: np.ndarray,
    rest_R: np.ndarray,
    rest_abs_R: np.ndarray,
) -> np.ndarray:
    """Columns of the selected features; those left out are added to the rests.

    Ignored errors stay columns of the layout, empty, so that offsets are plain.
    """
    out = np.ones(n_features, bool)
    out[selected] = False
    for left_out in (np.flatnonzero(out), ignored):
        dropped = edge_RN[:, left_out]
        rest_R += dropped.sum(1)
        rest_abs_R += np.abs(dropped).sum(1)
    edge_RN[:, ignored] = 0
    if len(selected) == n_features:
        return edge_RN
    other = np.arange(n_features, edge_RN.shape[1])
    columns = np.concatenate([selected, other])
    return submatrix(edge_RN, np.arange(len(edge_RN)), columns)


# -- from the targets' side: row by row ------------------------------------------------


def _pull_some(
    p: Prompt,
    puller: Puller,
    pool_size: int,
    work: dict[str, Any],
    on_rows: Callable[[int, int], None],
) -> Computed:
    """The targets' rows, then features' in order of influence until a limit."""
    A, K = len(p.active.layer_A), p.n_targets
    pool_A = np.arange(A)
    if p.shortlist is not None:
        pool_A = p.shortlist(p.active, _first_visits(p, puller))[:pool_size]
        work |= {"shortlist": len(pool_A)}
    elif pool_size < A:
        pool_A = _scout(p, puller, pool_size)
    n_rows = min(p.n_selected, len(pool_A)) + K
    rows = _PooledRows(p, puller, pool_A, _counted(on_rows, n_rows))
    if p.n_selected >= len(pool_A) and p.config.tolerance <= 0:
        rows.compute(np.arange(len(pool_A)))
    rows.compute(-1 - np.arange(K))
    while rows.done < len(rows.edge_RN):
        visit_A, outside = rows.visits()
        n = min(rows.at_once, len(rows.edge_RN) - rows.done)
        enough = p.config.tolerance - outside
        chosen, unexplored = next_features(visit_A, rows.open_A, n, enough=enough)
        if unexplored + outside <= p.config.tolerance:
            break
        rows.compute(chosen)
    flops = pull_flops(
        p.cfg,
        puller.bank,
        puller.plan,
        p.feature_rows(pool_A[rows.feature_R[: rows.done - K]]),
        skip=p.active.skip is not None,
    )
    return rows.finished(work | {"tflop": flops / 1e12})


_SCOUTS = 128  # rows looked at, not kept, before a pool is chosen


def _scout(p: Prompt, puller: Puller, size: int) -> np.ndarray:
    """Features to keep columns of when not all fit: those with most influence so far.

    The influence that the targets and the first features in its order pass on; what
    stays outside the pool is summed into the rest, so that no bound is touched.
    """
    is_node_LT = _nodes(p)
    visit_A = _first_visits(p, puller)
    first = np.sort(np.argsort(-visit_A, kind="stable")[:_SCOUTS])
    visit_A += visits(puller, p.feature_rows(first), visit_A[first], is_node_LT)
    return np.sort(np.argsort(-visit_A, kind="stable")[:size])


def _nodes(p: Prompt) -> np.ndarray:
    """Which errors are nodes, bool [L, T]."""
    is_node_LT = np.ones((p.cfg.n_layers, p.n_tokens), bool)
    is_node_LT.ravel()[p.ignored_errors()] = False
    return is_node_LT


def _first_visits(p: Prompt, puller: Puller) -> np.ndarray:
    """Influence that the targets pass on directly, [A]."""
    return visits(puller, p.target_rows(), p.target_weights(), _nodes(p))


class _PooledRows:
    """Rows computed on demand, kept in the order of computation.

    Features are named by their place in the pool, target k by -1 - k.
    """

    def __init__(
        self,
        p: Prompt,
        puller: Puller,
        pool_A: np.ndarray,
        on_rows: Callable[[int], None],
    ) -> None:
        self.p, self.puller, self.pool_A, self.on_rows = p, puller, pool_A, on_rows
        L, T = p.cfg.n_layers, p.n_tokens
        width = len(pool_A)
        n_rows = min(p.n_selected, width) + p.n_targets
        self.edge_RN = np.zeros((n_rows, width + L * T + T), p.error_LTD.dtype)
        self.rest_R, self.rest_abs_R = np.zeros(n_rows), np.zeros(n_rows)
        self.total_R = np.zeros(n_rows)
        self.feature_R = np.full(n_rows, width, np.int64)
        self.open_A = np.ones(width, bool)
        self.done = 0
        self.ignored = width + p.ignored_errors()
        # Many rows at once make chunks that are narrow in layer, hence cheap.
        quarter = max(512, -(-p.n_selected // 4))
        self.at_once = p.config.rows_per_update or quarter

    def compute(self, feature: np.ndarray) -> None:
        """Append the rows of some features, or of all targets."""
        new = slice(self.done, self.done + len(feature))
        is_target = feature[0] < 0 if len(feature) else False
        targets = (
            self.p.target_rows()
            if is_target
            else self.p.feature_rows(self.pool_A[feature])
        )
        edge_RN = self.edge_RN[new]
        edge_rows(
            self.puller,
            targets,
            edge_RN,
            pool_A=None if len(self.pool_A) == self.puller.n_features else self.pool_A,
            rest_R=self.rest_R[new],
            rest_abs_R=self.rest_abs_R[new],
            on_rows=self.on_rows,
        )
        if is_target:
            self.add_written(edge_RN)
        self.total_R[new] = _row_totals(edge_RN, self.ignored) + self.rest_abs_R[new]
        self.feature_R[new] = feature
        if not is_target:
            self.open_A[feature] = False
        self.done = new.stop

    def add_written(self, edge_KN: np.ndarray) -> None:
        """Add what targets read of an MLP's output themselves; theirs are first."""
        A, width = len(self.p.active.layer_A), len(self.pool_A)
        for k, edge_N in self.p.written():
            edge_KN[k, :width] += edge_N[self.pool_A]
            edge_KN[k, width:] += edge_N[A:]
            outside = np.delete(edge_N[:A], self.pool_A)
            self.rest_R[k] += outside.sum()
            self.rest_abs_R[k] += np.abs(outside).sum()

    def visits(self) -> tuple[np.ndarray, float]:
        """Influence that has arrived at the pool, and at everything outside it."""
        n = slice(0, self.done)
        weight_K = self.p.target_weights()
        layer_A = self.p.active.layer_A[self.pool_A]
        visit_A = arrived_influence(
            self.edge_RN[n], self.total_R[n], self.feature_R[n], weight_K, layer_A
        )
        feature_R = self.feature_R[n]
        visit_R = np.concatenate([visit_A, weight_K[::-1]])[feature_R]
        total_R = np.where(self.total_R[n] > 0, self.total_R[n], 1)
        return visit_A, float((visit_R * self.rest_abs_R[n] / total_R).sum())

    def finished(self, work: dict[str, Any]) -> Computed:
        """Rows and columns of the explored features; everything else in the rest."""
        feature_R = self.feature_R[: self.done]
        # Features in order, then targets (-1 - k) in order.
        order = np.lexsort((np.abs(feature_R), feature_R < 0))
        in_order = (order == np.arange(len(order))).all()
        edge_RN = self.edge_RN[: self.done]
        rest_R, rest_abs_R = self.rest_R[order], self.rest_abs_R[order]
        selected = np.sort(feature_R[feature_R >= 0])
        edge_RN = _cut_columns(
            edge_RN if in_order else edge_RN[order],
            len(self.pool_A),
            selected,
            self.ignored,
            rest_R,
            rest_abs_R,
        )
        return Computed(
            selected=self.pool_A[selected],
            edge_RN=edge_RN,
            rest_R=rest_R,
            rest_abs_R=rest_abs_R,
            work=work,
        )
