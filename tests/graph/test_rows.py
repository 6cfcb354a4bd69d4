"""Edges: two independent oracles, finite differences of any size, and conservation."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    FEW,
    case,
    case_active,
    case_graph,
    case_local,
    case_lrm,
    close,
    run_local_jit,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.certificate import certificate
from jaxclt.graph.graph import Graph
from jaxclt.graph.plan import make_plan
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.scores import scores
from jaxclt.lm.frozen import frozen_reads
from jaxclt.lm.run import unembed
from jaxclt.replacement.errors import error_nodes
from jaxclt.replacement.local import run_local
from jaxclt.testing import Tiny, tiny
from jaxclt.types import CLTParams, Reads, Sources

pytestmark = pytest.mark.usefixtures("x64")


def readouts(
    graph: Graph, t: Tiny, pre_LTF: np.ndarray, out_TD: np.ndarray
) -> np.ndarray:
    """What the rows of a graph explain, from a run; leading axes are kept."""
    place = (graph.layer_A, graph.pos_A, graph.feature_A)
    target = np.asarray(out_TD)[..., -1, :] @ np.asarray(t.targets.vec_KD).T
    return np.concatenate([np.asarray(pre_LTF)[(..., *place)], target], -1)


def one_source_changed(name: str, factor: float) -> list[np.ndarray]:
    """Embeddings, errors and activations [N, ...], source n multiplied in entry n."""
    graph, lrm = case_graph(name), case_lrm(name)
    clean = (lrm.embed_TD, lrm.error_LTD, case_local(name).a_LTF)
    embed, error, a = (
        np.broadcast_to(np.asarray(x), (graph.edge_RN.shape[1], *x.shape)).copy()
        for x in clean
    )
    n_A = np.arange(graph.n_features)
    a[n_A, graph.layer_A, graph.pos_A, graph.feature_A] *= factor
    for n in range(graph.error_cols.start, graph.error_cols.stop):
        layer, pos = divmod(n - graph.error_cols.start, graph.n_tokens)
        error[n, layer, pos] *= factor
    for pos, n in enumerate(range(graph.embed_cols.start, graph.embed_cols.stop)):
        embed[n, pos] *= factor
    return [embed, error, a]


@pytest.mark.parametrize(
    "name", ["clt", "skip", pytest.param("span2", marks=pytest.mark.slow)]
)
def test_an_edge_predicts_a_change_of_any_size(name: str) -> None:
    """Maths 6.6: source times M, all else held, changes a readout by (M - 1) A[t, s].

    Every feature, error and embedding, every row, M = -7.
    """
    t, graph, lrm = case(name), case_graph(name), case_lrm(name)

    @jax.jit
    @jax.vmap
    def run(embed_TD: jax.Array, error_LTD: jax.Array, a_LTF: jax.Array):
        local = run_local(lrm, embed_TD=embed_TD, error_LTD=error_LTD, a_LTF=a_LTF)
        return local.pre_LTF, local.out_TD

    changed = readouts(graph, t, *run(*one_source_changed(name, -7.0)))
    effect_RN = (changed - graph.readout_R[None, :]).T / -8.0
    close(graph.edge_RN, effect_RN, 1e-12)


@pytest.mark.parametrize("name", FEW)
def test_rows_equal_jax_reverse_mode_of_the_frozen_stream(name: str) -> None:
    """The pull-back by layers against `jax.vjp` of `frozen_reads`, all rows at once."""
    t, graph, active = case(name), case_graph(name), case_active(name)
    sources = Sources(embed_TD=t.recording.embed_TD, write_LTD=t.recording.write_LTD)
    frozen, R = t.recording.frozen, len(graph.edge_RN)
    f = partial(frozen_reads, t.params, frozen, cfg=t.cfg, skip=active.skip)
    mid_RLTD = np.zeros((R, *t.recording.mid_LTD.shape))
    A = np.arange(graph.n_features)
    mid_RLTD[A, graph.layer_A, graph.pos_A] = active.reads()
    out_RTD = np.zeros((R, *t.recording.out_TD.shape))
    out_RTD[graph.target_rows, -1] = t.targets.vec_KD
    pull = jax.jit(lambda ct: jax.vmap(jax.vjp(f, sources)[1])(ct)[0])
    back = jax.tree.map(np.asarray, pull(Reads(mid_LTD=mid_RLTD, out_TD=out_RTD)))
    want = np.zeros_like(graph.edge_RN)
    for s in A:
        layer = graph.layer_A[s]
        rows_MD = active.decoder[layer][active.row_A[s]]
        g_RMD = back.write_LTD[:, layer : layer + len(rows_MD), graph.pos_A[s]]
        want[:, s] = active.value_A[s] * (g_RMD * rows_MD).sum((1, 2))
    error = back.write_LTD * error_nodes(active, t.recording)
    want[:, graph.error_cols] = error.sum(-1).reshape(R, -1)
    want[:, graph.embed_cols] = (back.embed_TD * np.asarray(sources.embed_TD)).sum(-1)
    close(graph.edge_RN, want, 1e-13)


@pytest.mark.parametrize("name", FEW)
def test_rows_sum_to_what_they_explain(name: str) -> None:
    """Maths 6.3: sum of edges + bias = pre-activation, or demeaned logit."""
    t, graph = case(name), case_graph(name)
    total_R = graph.edge_RN.sum(1) + graph.bias_R + graph.rest_R
    close(total_R, graph.readout_R, 1e-13)
    assert not graph.rest_R.any()
    logit_V = np.asarray(unembed(t.params, t.recording.out_TD))[-1]
    want = np.r_[
        case_active(name).preact_A, (logit_V - logit_V.mean())[graph.target_token_K]
    ]
    close(graph.readout_R, want, 1e-12)


@pytest.mark.parametrize("name", ["clt", "skip", "span2"])
def test_bias_column_is_the_run_without_sources(name: str) -> None:
    """Maths 6.4: embeddings, errors and activations zero, all else pushed through."""
    t, graph, lrm = case(name), case_graph(name), case_lrm(name)
    clean = (lrm.embed_TD, lrm.error_LTD, case_local(name).a_LTF)
    embed, error, a = (np.zeros(x.shape) for x in clean)
    run = run_local_jit(lrm, embed_TD=embed, error_LTD=error, a_LTF=a)
    want = readouts(graph, t, run.pre_LTF, run.out_TD)
    close(graph.bias_R, want, 1e-13)


def test_without_biases_the_bias_column_is_zero() -> None:
    assert not case_graph("no_bias").bias_R.any()
    assert case_graph("clt").bias_R.all()


@pytest.mark.parametrize("name", FEW)
def test_edges_go_up_in_layers_and_forward_in_positions(name: str) -> None:
    """Maths 6.7: exact zeros where nothing can flow."""
    graph = case_graph(name)
    L, T = graph.n_layers, graph.n_tokens
    layer_N = np.r_[graph.layer_A, np.repeat(np.arange(L), T), np.full(T, -1)]
    pos_N = np.r_[graph.pos_A, np.tile(np.arange(T), L), np.arange(T)]
    layer_R = np.r_[graph.layer_A, np.full(graph.n_targets, L)]
    pos_R = np.r_[graph.pos_A, np.full(graph.n_targets, T - 1)]
    allowed = (layer_N < layer_R[:, None]) & (pos_N <= pos_R[:, None])
    assert (graph.edge_RN[~allowed] == 0).all()
    # No attention follows the last layer, so only its last position reaches a logit.
    stuck = (layer_N == L - 1) & (layer_R == L)[:, None] & (pos_N < T - 1)
    assert (graph.edge_RN[allowed & stuck] == 0).all()
    assert (graph.edge_RN[allowed & ~stuck] != 0).all()
    block = graph.edge_RN[:, graph.feature_cols][graph.feature_cols]
    assert not np.triu(block).any()


def test_a_node_for_every_active_feature_error_token_and_target() -> None:
    """Maths 5.1: nnz(a) + L T + T + 1 + K, the bias being a vector of its own."""
    t, graph = case("clt"), case_graph("clt")
    nnz = int((np.asarray(case_local("clt").a_LTF) != 0).sum())
    L, T, K = t.cfg.n_layers, len(t.token_T), len(t.targets.token_K)
    assert graph.edge_RN.shape == (nnz + K, nnz + L * T + T)
    assert graph.bias_R.shape == (nnz + K,)
    assert graph.embed_cols.stop == graph.edge_RN.shape[1]
    assert graph.target_rows.stop == graph.edge_RN.shape[0]


@pytest.mark.parametrize(("chunk_size", "n_bands"), [(32, 1), (64, 3)], ids=str)
def test_chunks_and_bands_change_nothing(chunk_size: int, n_bands: int) -> None:
    """Maths 6.8: batching of rows is invisible; every band meets every chunk edge."""
    config = AttributeConfig(
        max_features=None, tolerance=0.0, chunk_size=chunk_size, n_bands=n_bands
    )
    got = case("skip").graph(config)
    close(got.edge_RN, case_graph("skip").edge_RN, 1e-14)


def test_order_of_targets_changes_nothing() -> None:
    """Maths 6.8."""
    t, graph = case("clt"), case_graph("clt")
    K, A = graph.n_targets, graph.n_features
    flip = np.arange(K)[::-1]
    targets = jax.tree.map(lambda x: np.asarray(x)[flip], t.targets)
    got = dataclasses.replace(t, targets=targets).graph()
    close(got.edge_RN, graph.edge_RN[np.r_[np.arange(A), A + flip]], 1e-14)
    close(got.influence_N, graph.influence_N, 1e-13)


@pytest.mark.slow  # every operation compiles on its own
def test_jit_changes_nothing() -> None:
    """Maths 6.8: op by op gives the same graph."""
    t = tiny(7, n_layers=2, n_tokens=3, n_features=4, skip=True, dtype=jnp.float64)
    want = t.graph()
    assert want.n_features > 3
    with jax.disable_jit():
        got = t.graph()
    close(got.edge_RN, want.edge_RN, 1e-14)
    close(got.bias_R, want.bias_R, 1e-14)
    close(got.influence_N, want.influence_N, 1e-13)


def test_splitting_a_feature_splits_its_edges() -> None:
    """Maths 6.9: two copies with half the decoder; every other row is untouched."""
    t, graph = case("clt"), case_graph("clt")
    layer, F = 1, t.clt_cfg.n_features
    feature = int(graph.feature_A[np.flatnonzero(graph.layer_A == layer)[0]])
    clt = jax.tree.map(np.asarray, t.clt)

    def grown(x_LF: np.ndarray, fill: float) -> np.ndarray:
        """One more feature per layer: silent, but a copy in the split layer."""
        more = np.full_like(x_LF[:, :1], fill)
        more[layer, 0] = x_LF[layer, feature]
        return np.concatenate([x_LF, more], 1)

    W_dec = [np.concatenate([W, np.zeros_like(W[:1])]) for W in clt.W_dec]
    W_dec[layer][feature] /= 2
    W_dec[layer][F] = W_dec[layer][feature]
    split = CLTParams(
        W_enc_LFD=grown(clt.W_enc_LFD, 0.0),
        b_enc_LF=grown(clt.b_enc_LF, 0.0),
        theta_LF=grown(clt.theta_LF, 1.0),
        W_dec=tuple(W_dec),
        b_dec_LD=clt.b_dec_LD,
    )
    cfg = dataclasses.replace(t.clt_cfg, n_features=F + 1)
    got = dataclasses.replace(t, clt=split, clt_cfg=cfg).graph()
    halved = (graph.layer_A == layer) & (graph.feature_A == feature)
    is_copy = (got.layer_A == layer) & (got.feature_A == F)
    halved, copy = np.flatnonzero(halved), np.flatnonzero(is_copy)
    old = np.flatnonzero(~is_copy)  # the columns of the old graph, in its order
    original = old[halved]
    assert len(copy) == len(halved) > 1
    rest = np.arange(graph.n_features, graph.edge_RN.shape[1])
    new_columns = np.r_[old, rest + len(copy)]
    new_rows = np.r_[old, np.arange(graph.n_targets) + got.n_features]
    want = graph.edge_RN.copy()
    want[:, halved] /= 2
    close(got.edge_RN[np.ix_(new_rows, new_columns)], want, 1e-13)
    close(got.edge_RN[:, copy], got.edge_RN[:, original], 1e-14)
    close(got.edge_RN[copy], got.edge_RN[original], 1e-14)


@pytest.mark.parametrize("n_bands", [1, 2, 3, None])
def test_bands_touch_the_fewest_positions(n_bands: int | None) -> None:
    """The plan against all ways to cut the positions; every target is in one chunk."""
    T = 7
    pos_R = np.repeat(np.arange(T), 20)
    layer_R = np.arange(len(pos_R)) % 4
    plan = make_plan(len(pos_R), n_positions=T, flops_per_position=1e9, n_bands=n_bands)
    assert plan.band_end[-1] == T
    assert (np.diff((0, *plan.band_end)) > 0).all()
    chunks = plan.chunks(layer_R, pos_R + 1)
    assert sorted(np.concatenate([c.index_B for c in chunks])) == list(
        range(len(pos_R))
    )
    for chunk in chunks:
        assert len(chunk.index_B) <= chunk.capacity <= plan.capacity
        assert pos_R[chunk.index_B].max() < chunk.n_positions
        assert (np.diff(layer_R[chunk.index_B]) <= 0).all()

    def touched(ends: tuple[int, ...]) -> int:
        return int(np.array(ends)[np.searchsorted(ends, pos_R, side="right")].sum())

    cuts = itertools.combinations(range(1, T), len(plan.band_end) - 1)
    assert touched(plan.band_end) == min(touched((*c, T)) for c in cuts)
    if n_bands is not None:
        assert len(plan.band_end) == n_bands


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), max_size=400))
def test_long_prompts_pad_few_rows(travellers: list[tuple[int, int]]) -> None:
    """Every target once; a chunk is at least three quarters full, or the smallest."""
    levels_R, reach_R = np.array(travellers, int).reshape(-1, 2).T
    plan = make_plan(2000, n_positions=300, flops_per_position=1e9, chunk_size=128)
    assert plan.capacities == (128, 32, 8)
    assert make_plan(2000, n_positions=9, flops_per_position=1e6).capacities == (128,)
    chunks = plan.chunks(levels_R, reach_R)
    index = [i for chunk in chunks for i in chunk.index_B]
    assert sorted(index) == list(range(len(travellers)))
    smallest = 0
    for chunk in chunks:
        assert (reach_R[chunk.index_B] <= chunk.n_positions).all()
        assert chunk.capacity in plan.capacities
        assert len(chunk.index_B) <= chunk.capacity
        full = len(chunk.index_B) >= 0.75 * chunk.capacity
        assert full or chunk.capacity == 8
        smallest += not full
    assert smallest <= len(plan.band_end)


# -- the certificate -------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_certificate_of_an_exact_graph_is_rounding(name: str) -> None:
    got = certificate(case_graph(name))
    assert got.max_relative_row_error < 5e-15
    assert got.rest_share == 0
    assert (got.bias_share == 0) == (name == "no_bias")
    assert 0 < got.error_share < 1


def test_certificate_notices_one_wrong_edge() -> None:
    graph = case_graph("clt")
    edge_RN = graph.edge_RN.copy()
    row = graph.n_features // 2
    column = np.abs(edge_RN[row]).argmax()
    edge_RN[row, column] *= 1.01
    wrong = certificate(dataclasses.replace(graph, edge_RN=edge_RN))
    share = np.abs(graph.edge_RN[row]).max() / (
        np.abs(edge_RN[row]).sum() + abs(graph.bias_R[row])
    )
    assert wrong.max_relative_row_error == pytest.approx(0.01 * share, rel=1e-9)
    lost = certificate(dataclasses.replace(graph, bias_R=np.zeros_like(graph.bias_R)))
    assert lost.max_relative_row_error > 0.1


def test_certificate_skips_rows_that_were_not_computed() -> None:
    graph = case_graph("clt")
    edge_RN, attributed = graph.edge_RN.copy(), graph.attributed_R.copy()
    edge_RN[3], attributed[3] = 0, False
    missing = dataclasses.replace(graph, edge_RN=edge_RN, attributed_R=attributed)
    assert certificate(missing).max_relative_row_error < 5e-15
    none = dataclasses.replace(graph, attributed_R=np.zeros_like(attributed))
    assert certificate(none).max_relative_row_error == 0


def test_a_dictionary_with_nan_is_refused() -> None:
    t = case("clt")
    active = t.active
    broken = dataclasses.replace(active, write_bias_LD=active.write_bias_LD * np.nan)
    with pytest.raises(Exception, match="not finite"):
        attribute_recording(
            Prompt(t.params, t.recording, broken, t.targets, cfg=t.cfg), t.meta
        )


def test_a_dictionary_that_is_silent_leaves_everything_to_the_errors() -> None:
    """Zero CLT: no feature nodes, replacement only by direct embedding paths."""
    t = case("clt")
    theta_LF = jnp.full_like(t.clt.b_enc_LF, 1e6)
    silent = dataclasses.replace(
        t, clt=dataclasses.replace(t.clt, theta_LF=theta_LF)
    ).graph()
    assert silent.n_features == 0
    assert certificate(silent).max_relative_row_error < 5e-15
    got = scores(silent)
    assert got.mean_path_length == pytest.approx(1.0)
    assert got.embedding_share + got.error_share + got.bias_share == pytest.approx(1.0)
    assert got.error_share > 0
