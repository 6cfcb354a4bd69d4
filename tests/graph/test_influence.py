"""Influence: three forms of one sum, what it means, and its signed twin."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    case,
    case_graph,
    case_local,
    case_lrm,
    close,
    random_graph,
    share_matrix,
    walk_visits,
)

from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.graph.influence import influence_series, solve_influence, solve_walk
from jaxclt.graph.shares import shares_total
from jaxclt.replacement.local import run_local

pytestmark = pytest.mark.usefixtures("x64")


def solved(graph: Graph, weight_K: np.ndarray | None = None) -> np.ndarray:
    weight_K = graph.target_prob_K if weight_K is None else weight_K
    return solve_influence(graph.edge_RN, shares_total(graph), weight_K)


@pytest.mark.parametrize("name", ["clt", "plt"])
def test_solve_series_and_inverse_agree(name: str) -> None:
    """Maths 8.2: back substitution == L + 1 terms == (I - A)^-1 - I."""
    graph = case_graph(name)
    terms = influence_series(
        graph.edge_RN,
        shares_total(graph),
        graph.target_prob_K,
        n_layers=graph.n_layers,
    )
    N = graph.edge_RN.shape[1]
    prob = graph.target_prob_K.sum()
    inverse = walk_visits(graph, share_matrix(graph))[:N] * prob
    close(np.asarray(terms).sum(0), inverse, 1e-13)
    close(solved(graph), inverse, 1e-13)
    close(graph.influence_N, inverse, 1e-13)


def test_paths_end_after_one_feature_per_layer() -> None:
    """Maths 8.3: the longest path has L + 1 edges, and there is one that long."""
    graph = case_graph("clt")
    share = share_matrix(graph)
    power = np.linalg.matrix_power(share, graph.n_layers + 1)
    assert power.max() > 0
    assert not (power @ share).any()


def test_the_papers_pseudocode_is_identically_zero() -> None:
    """Maths 8.7: B @ weights instead of weights @ B."""
    graph = case_graph("clt")
    share = share_matrix(graph)
    weight = np.zeros(len(share))
    N = graph.edge_RN.shape[1]
    weight[N : N + graph.n_targets] = graph.target_prob_K
    B = np.linalg.inv(np.eye(len(share)) - share) - np.eye(len(share))
    assert np.abs(B @ weight).max() < 1e-15
    assert (weight @ B).max() > 0.01


@pytest.mark.parametrize("name", ["clt", "no_bias"])
def test_roots_share_the_weight_of_the_targets(name: str) -> None:
    """Maths 8.4: every walk ends in an error, an embedding, the bias or outside."""
    graph = case_graph(name)
    visits = np.r_[graph.influence_N[: graph.n_features], graph.target_prob_K]
    share_R = (np.abs(graph.bias_R) + graph.rest_abs_R) / shares_total(graph)
    ended = graph.influence_N[graph.n_features :].sum() + visits @ share_R
    assert ended == pytest.approx(graph.target_prob_K.sum(), rel=1e-13)
    assert (graph.influence_N >= 0).all()
    assert graph.influence_N.max() <= graph.target_prob_K.sum()


def test_roots_share_the_weight_with_rest_and_zero_rows() -> None:
    """Maths 8.4, with features that nothing feeds: the walk ends in them."""
    graph = random_graph(3, zero_rows=0.3)
    total_R = shares_total(graph)
    assert (total_R == 0).any()
    visits = np.r_[graph.influence_N[: graph.n_features], graph.target_prob_K]
    outside = (np.abs(graph.bias_R) + graph.rest_abs_R) / np.where(total_R, total_R, 1)
    ended = graph.influence_N[graph.n_features :].sum()
    ended += visits @ np.where(total_R > 0, outside, 1)
    assert ended == pytest.approx(graph.target_prob_K.sum(), rel=1e-13)


def test_scaling_a_row_changes_nothing() -> None:
    """Maths 8.5: only the shares of a row matter."""
    graph = random_graph(4)
    factor = np.exp(np.sin(np.arange(len(graph.edge_RN)) * 3.0) * 3)
    scaled = dataclasses.replace(
        graph,
        edge_RN=-graph.edge_RN * factor[:, None],
        bias_R=graph.bias_R * factor,
        rest_abs_R=graph.rest_abs_R * factor,
    )
    close(solved(scaled), graph.influence_N, 1e-13)


def test_order_within_a_layer_changes_nothing() -> None:
    """Maths 8.5: permuting the features of a layer permutes their influence."""
    graph = random_graph(5, counts=(4, 5, 3))
    A, N = graph.n_features, graph.edge_RN.shape[1]
    order = np.r_[[2, 0, 3, 1], 4 + np.array([4, 1, 0, 3, 2]), [11, 9, 10]]
    rows, columns = np.r_[order, np.arange(A, A + 2)], np.r_[order, np.arange(A, N)]
    permuted = dataclasses.replace(
        graph,
        edge_RN=graph.edge_RN[np.ix_(rows, columns)],
        bias_R=graph.bias_R[rows],
        rest_abs_R=graph.rest_abs_R[rows],
    )
    close(solved(permuted), graph.influence_N[columns], 1e-13)


def test_influence_is_the_chance_that_a_walk_visits() -> None:
    """Maths 8.6: 40,000 seeded walks from the targets; none off by five deviations."""
    graph = random_graph(6, zero_rows=0.2)
    share = share_matrix(graph)
    n, N = 40_000, graph.edge_RN.shape[1]
    weight_K = graph.target_prob_K / graph.target_prob_K.sum()
    key = jax.random.key(0)
    u = np.asarray(jax.random.uniform(key, (graph.n_layers + 3, n)))
    at = N + np.searchsorted(np.cumsum(weight_K), u[0])
    cumulative = np.cumsum(share, 1)
    seen = np.zeros(len(share))
    for step in u[1:]:
        at = (cumulative[at] < step[: len(at), None]).sum(1)
        at = at[at < len(share)]  # a root, or a row with nothing in it, ends a walk
        np.add.at(seen, at, 1)
    assert len(at) == 0
    p = solved(graph, weight_K)
    deviation = np.sqrt(p * (1 - p) / n)
    assert (np.abs(seen[:N] / n - p) <= 5 * deviation + 1e-12).all()
    assert (p > 0.01).sum() > 10


@pytest.mark.parametrize("block", [2, 5, 512])
def test_blocks_of_the_substitution_change_nothing(block: int) -> None:
    """The host's blocked solve against the plain one, and its lengths (maths 12.9)."""
    graph = random_graph(7, zero_rows=0.2)
    args = (graph.edge_RN, shares_total(graph), graph.target_prob_K)
    got = solve_walk(*args, block=block)
    N, prob = graph.edge_RN.shape[1], graph.target_prob_K.sum()
    inverse = walk_visits(graph, share_matrix(graph))[:N] * prob
    close(got.visit_N, inverse, 1e-13)
    terms = np.asarray(influence_series(*args, n_layers=graph.n_layers))
    close(got.visit_N, terms.sum(0), 1e-13)
    steps = np.arange(1, graph.n_layers + 2)
    close(got.length_N, steps @ terms, 1e-13)


def test_row_totals_by_convention() -> None:
    graph = random_graph(8)
    size = np.abs(graph.edge_RN).sum(1)
    close(shares_total(graph), size + np.abs(graph.bias_R) + graph.rest_abs_R, 1e-15)
    peer = dataclasses.replace(graph.meta, convention="circuit-tracer")
    close(shares_total(dataclasses.replace(graph, meta=peer)), size, 1e-15)


@pytest.mark.parametrize("name", ["clt", "skip"])
def test_total_effect_is_the_derivative_of_the_local_model(name: str) -> None:
    """Maths 9.1: d target / d factor on a feature, gates held, all paths.

    Features are re-encoded layer by layer (L passes settle a layered system); the gate
    of each is the clean one, and only the activation of one feature is multiplied.
    """
    t, graph, lrm = case(name), case_graph(name), case_lrm(name)
    clean = case_local(name).a_LTF
    gate_LTF = np.asarray(clean != 0)

    def targets(factor_LTF: jax.Array) -> jax.Array:
        a = clean
        for _ in range(t.cfg.n_layers):
            pre = run_local(lrm, a_LTF=a).pre_LTF
            a = jnp.where(gate_LTF, pre * factor_LTF, 0)
        return t.targets.vec_KD @ run_local(lrm, a_LTF=a).out_TD[-1]

    one = np.ones(clean.shape)
    slope_KLTF = np.asarray(jax.jit(jax.jacrev(targets))(one))
    want = slope_KLTF[:, graph.layer_A, graph.pos_A, graph.feature_A]
    got = solve_total_effect(graph)
    close(got, want, 1e-12)
    # It is not the direct effect: paths through other features matter.
    direct = graph.edge_RN[graph.target_rows, graph.feature_cols]
    assert np.abs(got - direct).max() > 0.05 * np.abs(direct).max()


def test_float32_influence_is_right_to_single_precision() -> None:
    """Against the inverse in float64, on several blocks of features."""
    graph = random_graph(9, counts=(120,) * 3, density=0.9)
    edge_RN = graph.edge_RN.astype(np.float32)
    graph = dataclasses.replace(graph, edge_RN=edge_RN.astype(np.float64))
    N = edge_RN.shape[1]
    want = walk_visits(graph, share_matrix(graph))[:N] * graph.target_prob_K.sum()
    total_R = shares_total(dataclasses.replace(graph, edge_RN=edge_RN))
    got = solve_influence(edge_RN, total_R, graph.target_prob_K)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * want.max())
    close(solved(graph), want, 1e-12)
