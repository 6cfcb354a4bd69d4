"""Models, dictionaries and graphs that many tests share, and plain-numpy oracles.

Compiling costs far more than running, so each case is built once per process.
"""

from __future__ import annotations

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxclt.cli import main as cli
from jaxclt.clt.active import Active
from jaxclt.graph.bank import RowTargets
from jaxclt.graph.certificate import certificate
from jaxclt.graph.columns import Columns
from jaxclt.graph.graph import Graph, GraphMeta, Pruning
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.plan import Plan
from jaxclt.graph.prompt import Recorded
from jaxclt.graph.rows import edge_rows, make_puller
from jaxclt.graph.target_reads import target_reads
from jaxclt.graph.travel import Way
from jaxclt.replacement.errors import error_nodes
from jaxclt.replacement.local import LocalReplacement, LocalRun, run_local
from jaxclt.testing import Tiny, tiny
from jaxclt.types import Recording

# Three models (biases, GQA, tied embeddings on and off), six dictionaries.
CASES = {
    "clt": {"seed": 0},
    "plt": {"seed": 1, "span": 1, "read": "normalized"},
    "skip": {"seed": 2, "skip": True, "read": "mlp_in"},
    "span2": {
        "seed": 3,
        "span": 2,
        "activation": "relu",
        "n_kv_heads": 4,
        "tied": True,
    },
    "topk": {
        "seed": 4,
        "activation": "signed_topk",
        "read": "mlp_in",
        "n_kv_heads": 4,
        "tied": True,
    },
    "no_bias": {"seed": 5, "biases": False},
}
MODELS = ("clt", "span2", "no_bias")  # one case per model
# Other families. Most have the linear maps of the first or of another one, so that the
# default suite leaves them to their taps.
FAMILY_CASES = {
    "gemma2": {"seed": 6, "family": "gemma2", "read": "mlp_in", "skip": True},
    "gemma3": {"seed": 7, "family": "gemma3", "tied": True},
    "llama3": {"seed": 8, "family": "llama3", "span": 2},
    "mistral": {"seed": 9, "family": "mistral", "biases": False},
    "qwen3": {"seed": 10, "family": "qwen3", "read": "normalized"},
    "gpt2": {"seed": 11, "family": "gpt2", "read": "normalized", "tied": True},
    "neox": {"seed": 12, "family": "neox", "read": "mlp_in", "skip": True},
    "olmo3": {"seed": 13, "family": "olmo3", "read": "mlp_in", "skip": True},
    "turned": {"seed": 14, "family": "turned"},
}
OWN_MAPS = ("gemma2", "gemma3", "neox")
FAMILIES = [
    name if name in OWN_MAPS else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILY_CASES
]
# For costly tests: two cases in the default suite, the others with `-m slow`.
FEW = [
    name if name in ("clt", "skip") else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
]


@functools.cache
def case(name: str) -> Tiny:
    """A case in float64; use it in modules marked x64."""
    with jax.enable_x64(True):
        return tiny(dtype=jnp.float64, **(CASES | FAMILY_CASES)[name])


@functools.cache
def case_active(name: str) -> Active:
    with jax.enable_x64(True):
        return case(name).active


@functools.cache
def case_lrm(name: str) -> LocalReplacement:
    with jax.enable_x64(True):
        return jax.jit(lambda: case(name).lrm)()


@functools.cache
def case_graph(name: str) -> Graph:
    with jax.enable_x64(True):
        return case(name).graph()


def recorded(t: Tiny, active: Active, recording: Recording | None = None) -> Recorded:
    """A case's prompt (or another recording of its model) with some active features."""
    recording = t.recording if recording is None else recording
    return Recorded(t.params, recording, active, cfg=t.cfg)


@functools.cache
def case_recorded(name: str) -> Recorded:
    with jax.enable_x64(True):
        return recorded(case(name), case_active(name))


def graph_rows(p: Recorded, vec_KD: np.ndarray | jax.Array) -> RowTargets:
    """What all rows of a graph read: its features, then directions of the output."""
    a, K, last = p.active, len(vec_KD), p.n_tokens - 1
    target_KD = target_reads(p.params, p.recording, vec_KD, last)
    return RowTargets(
        layer_R=np.concatenate([a.layer_A, np.full(K, a.n_layers, np.int32)]),
        pos_R=np.concatenate([a.pos_A, np.full(K, last, np.int32)]),
        read_RD=np.concatenate([a.reads(), target_KD]),
    )


def pulled_rows(p: Recorded, rows: RowTargets, way: Way | None = None) -> np.ndarray:
    """Edges of some rows, [R, N], down the frozen stream or another way."""
    T, R = p.n_tokens, len(rows.pos_R)
    puller = make_puller(
        p,
        plan=Plan(band_end=(T,), capacities=(R,)),
        mesh=Mesh(np.array(jax.devices()[:1]), ("rows",)),
        way=way,
    )
    edge_RN = np.zeros((R, Columns(p).layout.n_columns), rows.read_RD.dtype)
    edge_rows(puller, rows, edge_RN)
    return edge_RN


def layer_cut(
    p: Recorded, rows: RowTargets, layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Maths 7.5: edges with all heads of a layer off, and what each of them adds."""
    frozen = p.recording.frozen

    def edges(*on: int) -> np.ndarray:
        assert frozen.pattern_LHTS is not None
        off_H = np.setdiff1d(np.arange(p.cfg.n_heads), on)
        gated_LHTS = frozen.pattern_LHTS.at[layer, off_H].set(0)
        recording = p.recording.replace(frozen=frozen.replace(pattern_LHTS=gated_LHTS))
        return pulled_rows(dataclasses.replace(p, recording=recording), rows)

    bypass_RN = edges()
    heads = range(p.cfg.n_heads)
    return bypass_RN, np.stack([edges(head) - bypass_RN for head in heads])


run_local_jit = jax.jit(run_local)


@functools.cache
def case_local(name: str) -> LocalRun:
    """The local replacement model run on its clean sources, features re-encoded."""
    with jax.enable_x64(True):
        return run_local_jit(case_lrm(name))


def close(got: object, want: object, tol: float = 1e-12) -> None:
    """Equal within `tol` of the largest entry: rounding, not agreement."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    scale = np.abs(want).max(initial=0)
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * max(scale, 1e-30))


def same_rows(got: Graph, full: Graph) -> None:
    """Edges between its nodes are those of the full graph, the others are summed."""
    key = list(zip(full.layer_A, full.pos_A, full.feature_A, strict=True))
    mine = zip(got.layer_A, got.pos_A, got.feature_A, strict=True)
    index = np.array([key.index(k) for k in mine])
    A = full.n_features
    rows = np.r_[index, np.arange(A, len(full.edge_RN))]
    columns = np.r_[index, np.arange(A, full.edge_RN.shape[1])]
    close(got.edge_RN, full.edge_RN[np.ix_(rows, columns)], 1e-13)
    left_out = np.delete(full.edge_RN[rows], columns, axis=1)
    close(got.rest_R, left_out.sum(1), 1e-12)
    close(got.rest_abs_R, np.abs(left_out).sum(1), 1e-12)
    assert certificate(got).max_relative_row_error < 1e-14


# -- random graphs ---------------------------------------------------------------------


def random_graph(
    seed: int = 0,
    *,
    counts: tuple[int, ...] = (4, 5, 3),
    n_tokens: int = 3,
    n_targets: int = 2,
    density: float = 0.7,
    bias: bool = True,
    rest: bool = True,
    zero_rows: float = 0.0,
    convention: str = "paper",
) -> Graph:
    """A layered, causal graph with random edges that needs no model.

    Args:
      seed: of everything random.
      counts: features per layer.
      n_tokens: T.
      n_targets: K.
      density: share of the allowed edges that are there.
      bias: give rows a bias path.
      rest: give rows sources that are not columns.
      zero_rows: share of feature rows with nothing in them.
      convention: of the graph.
    """
    rng = random.Random(seed)

    def uniform(*shape: int) -> np.ndarray:
        return np.array([rng.random() for _ in range(int(np.prod(shape)))]).reshape(
            shape
        )

    L, T, K, A = len(counts), n_tokens, n_targets, sum(counts)
    layer_A = np.repeat(np.arange(L), counts)
    pos_A = (uniform(A) * T).astype(np.int32)
    order = np.lexsort((pos_A, layer_A))
    layer_A, pos_A = layer_A[order].astype(np.int32), pos_A[order]
    layer_N = np.concatenate([layer_A, np.repeat(np.arange(L), T), np.full(T, -1)])
    pos_N = np.concatenate([pos_A, np.tile(np.arange(T), L), np.arange(T)])
    layer_R = np.concatenate([layer_A, np.full(K, L)])
    pos_R = np.concatenate([pos_A, np.full(K, T - 1)])
    R, N = A + K, A + L * T + T
    live_R = np.concatenate([uniform(A) >= zero_rows, np.ones(K, bool)])
    there = (layer_N[None] < layer_R[:, None]) & (pos_N[None] <= pos_R[:, None])
    there &= (uniform(R, N) < density) & live_R[:, None]
    edge_RN = (uniform(R, N) * 2 - 0.7) ** 3 * there
    bias_R = (uniform(R) - 0.5) * bias * live_R
    rest_R = (uniform(R) - 0.5) * rest * live_R
    prob_K = np.sort(uniform(K))[::-1] + 0.05
    prob_K = 0.95 * prob_K / prob_K.sum()
    tokens = tuple(f"t{i}" for i in range(T))
    graph = Graph(
        meta=GraphMeta(
            model="random",
            dictionary="random",
            prompt="".join(tokens),
            tokens=tokens,
            target_tokens=tuple(f"k{i}" for i in range(K)),
            n_layers=L,
            convention=convention,
        ),
        token_T=np.arange(T, dtype=np.int32),
        layer_A=layer_A,
        pos_A=pos_A,
        feature_A=np.arange(A, dtype=np.int32),
        value_A=uniform(A) + 0.1,
        preact_A=uniform(A) + 0.1,
        attributed_R=np.ones(R, bool),
        target_token_K=np.arange(K, dtype=np.int32),
        target_prob_K=prob_K,
        edge_RN=edge_RN,
        bias_R=bias_R,
        rest_R=rest_R,
        rest_abs_R=1.5 * np.abs(rest_R),
        readout_R=edge_RN.sum(1) + bias_R + rest_R,
        influence_N=np.zeros(N),
        pruning=Pruning(
            keep_N=np.ones(N, bool),
            keep_edge_RN=np.ones((R, N), bool),
            node_threshold=1.0,
            edge_threshold=1.0,
        ),
    )
    return solved(graph)


def solved(graph: Graph) -> Graph:
    """The graph with the influence that belongs to its edges."""
    total_R = np.abs(graph.edge_RN).sum(1)
    if graph.meta.convention == "paper":
        total_R = total_R + np.abs(graph.bias_R) + graph.rest_abs_R
    found = solve_influence(graph.edge_RN, total_R, graph.target_prob_K)
    return dataclasses.replace(graph, influence_N=found)


# -- oracles ---------------------------------------------------------------------------


def column_writes(t: Tiny, active: Active, *, neurons: bool) -> np.ndarray:
    """What every column writes, [N, 1 + L, T, D], from the weights themselves."""
    L, T, D = t.recording.mid_LTD.shape
    A = len(active.layer_A)
    change = np.zeros((A + L * T + T, 1 + L, T, D))
    blocks = t.params.blocks
    for a in range(A):
        layer, pos, f = active.layer_A[a], active.pos_A[a], active.feature_A[a]
        if neurons:
            row_D = np.asarray(blocks.down_LID[layer, f])
            if blocks.post_mlp_LD is not None:
                row_D = row_D * np.asarray(blocks.post_mlp_LD[layer])
            rows_MD = row_D[None]
        else:
            rows_MD = np.asarray(t.clt.W_dec[layer][f])
        span = slice(1 + layer, 1 + layer + len(rows_MD))
        change[a, span, pos] = active.value_A[a] * rows_MD
    error_LTD = error_nodes(active, t.recording)
    for layer in range(L):
        for pos in range(T):
            change[A + layer * T + pos, 1 + layer, pos] = error_LTD[layer, pos]
    for pos in range(T):
        change[A + L * T + pos, 0, pos] = np.asarray(t.recording.embed_TD)[pos]
    return change


def share_matrix(graph: Graph, edge_RN: np.ndarray | None = None) -> np.ndarray:
    """Â over all nodes: the columns of the graph, its targets, then bias, then rest.

    Shares are of the full rows; `edge_RN` may hold fewer edges.
    """
    R, N = graph.edge_RN.shape
    A, paper = graph.n_features, graph.meta.convention == "paper"
    size_RM = np.hstack(
        [
            np.abs(graph.edge_RN if edge_RN is None else edge_RN),
            np.zeros((R, graph.n_targets)),
            np.abs(graph.bias_R)[:, None] * paper,
            graph.rest_abs_R[:, None] * paper,
        ]
    )
    total_R = np.abs(graph.edge_RN).sum(1) + size_RM[:, -2:].sum(1)
    share = np.zeros((N + graph.n_targets + 2,) * 2)
    row = np.r_[np.arange(A), N + np.arange(graph.n_targets)]
    share[row] = size_RM / np.where(total_R > 0, total_R, 1)[:, None]
    return share


def walk_visits(graph: Graph, share: np.ndarray) -> np.ndarray:
    """Probability that the walk from the targets visits each node, by an inverse."""
    start = np.zeros(len(share))
    N = graph.edge_RN.shape[1]
    weight_K = graph.target_prob_K.astype(np.float64)
    start[N : N + graph.n_targets] = weight_K / weight_K.sum()
    return start @ np.linalg.inv(np.eye(len(share)) - share)


def run_command(*args: object) -> int:
    """Exit status of a command line, run in this process."""
    try:
        cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
