"""Pruning: what survives, in which order, by both conventions."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from cases import case_graph, random_graph, solved

from jaxclt.errors import InputError
from jaxclt.graph.certificate import certificate
from jaxclt.graph.graph import Graph
from jaxclt.graph.prune import kept_by_mass, prune, restrict
from jaxclt.graph.scores import scores

pytestmark = pytest.mark.usefixtures("x64")


def as_peer(graph: Graph) -> Graph:
    meta = dataclasses.replace(graph.meta, convention="circuit-tracer")
    return dataclasses.replace(graph, meta=meta)


def test_threshold_one_keeps_everything_with_a_score() -> None:
    """Maths 11.2: a special case, not the end of a float cumsum."""
    graph = random_graph(1, zero_rows=0.3)
    got = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    fixed = np.arange(graph.edge_RN.shape[1]) >= graph.n_features
    np.testing.assert_array_equal(got.keep_N, (graph.influence_N > 0) | fixed)
    visited = np.r_[graph.influence_N[: graph.n_features] > 0, [True] * graph.n_targets]
    np.testing.assert_array_equal(
        got.keep_edge_RN, (graph.edge_RN != 0) & visited[:, None]
    )


@pytest.mark.parametrize("name", ["clt", "plt"])
def test_node_sets_grow_with_the_threshold(name: str) -> None:
    """Maths 11.3."""
    graph = case_graph(name)
    kept = [
        prune(graph, node_threshold=x).keep_N for x in (0.3, 0.6, 0.8, 0.95, 0.999, 1.0)
    ]
    for small, large in itertools.pairwise(kept):
        assert not (small & ~large).any()
    sizes = [int(k[graph.feature_cols].sum()) for k in kept]
    assert sizes[0] < sizes[2] < sizes[-1]


def test_edge_sets_grow_with_the_threshold_at_a_fixed_node_set() -> None:
    """Maths 11.3."""
    graph = case_graph("clt")
    kept = [prune(graph, edge_threshold=x) for x in (0.2, 0.5, 0.9, 0.98, 1.0)]
    for small, large in itertools.pairwise(kept):
        np.testing.assert_array_equal(small.keep_N, large.keep_N)
        assert not (small.keep_edge_RN & ~large.keep_edge_RN).any()
        assert small.keep_edge_RN.sum() < large.keep_edge_RN.sum()


def test_embeddings_and_errors_survive() -> None:
    """Maths 11.4: paper mode keeps them all, circuit-tracer's the embeddings."""
    graph = case_graph("clt")
    got = prune(graph, node_threshold=0.1, edge_threshold=0.1)
    assert got.keep_N[graph.embed_cols].all()
    assert got.keep_N[graph.error_cols].all()
    peer = prune(as_peer(graph), node_threshold=0.1, edge_threshold=0.1)
    assert peer.keep_N[graph.embed_cols].all()
    assert not peer.keep_N[graph.error_cols].all()


@pytest.mark.parametrize("seed", range(4))
def test_circuit_tracer_mode_leaves_no_dead_ends(seed: int) -> None:
    """Maths 11.5: every kept feature has edges in and out, every error one out."""
    graph = random_graph(
        seed, counts=(6, 6, 6), zero_rows=0.2, density=0.4, convention="circuit-tracer"
    )
    got = prune(graph, node_threshold=0.8, edge_threshold=0.7)
    A = graph.n_features
    feature, error = got.keep_N[:A], got.keep_N[graph.error_cols]
    assert feature.any()
    assert got.keep_edge_RN[:A].any(1)[feature].all()
    leaves = got.keep_edge_RN.any(0)
    assert leaves[:A][feature].all()
    assert leaves[graph.error_cols][error].all()


def test_pruning_ignores_the_scale_of_the_target_weights() -> None:
    """Maths 11.6."""
    graph = random_graph(2, counts=(8, 8, 8))
    scaled = dataclasses.replace(
        graph,
        target_prob_K=graph.target_prob_K * 0.125,
        influence_N=graph.influence_N * 0.125,
    )
    a, b = prune(graph), prune(scaled)
    np.testing.assert_array_equal(a.keep_N, b.keep_N)
    np.testing.assert_array_equal(a.keep_edge_RN, b.keep_edge_RN)


def test_the_shortest_prefix_that_holds_the_mass() -> None:
    """The node that crosses the threshold is kept (maths 11.7)."""
    score = np.array([1.0, 5.0, 0.0, 3.0, 1.0])
    assert kept_by_mass(score, 0.5, ties=False).tolist() == [0, 1, 0, 0, 0]
    assert kept_by_mass(score, 0.51, ties=False).tolist() == [0, 1, 0, 1, 0]
    assert kept_by_mass(score, 0.85, ties=False).tolist() == [1, 1, 0, 1, 0]
    assert kept_by_mass(score, 0.85, ties=True).tolist() == [1, 1, 0, 1, 1]
    assert kept_by_mass(score, 1.0, ties=False).tolist() == [1, 1, 0, 1, 1]
    assert not kept_by_mass(np.zeros(3), 0.5, ties=False).any()


def by_sorting(score: np.ndarray, threshold: float, *, ties: bool) -> np.ndarray:
    """What `kept_by_mass` keeps, by a stable sort of everything."""
    order = np.argsort(-score, kind="stable")
    mass = np.cumsum(score[order], dtype=np.float64)
    crossing = int(np.searchsorted(mass / mass[-1], threshold))
    if ties:
        return score >= score[order[crossing]]
    keep = np.zeros(score.shape, bool)
    keep[order[: crossing + 1]] = True
    return keep


@pytest.mark.parametrize("power", [0, 0.1, 1, 12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_selection_by_mass_is_what_sorting_would_keep(power: float, dtype: type):
    """100,000 scores: all equal, nearly equal, even, or a few that hold everything."""
    x = np.modf(np.abs(np.sin(np.arange(1, 100_001) * 12.9898)) * 43758.5453)[0]
    score = (x**power).astype(dtype)
    score[::3] = 0
    score[1000:9000] = score[5001]  # many ties
    for threshold in (1e-6, 0.2, 0.5, 0.8, 0.98, 0.999999):
        for ties in (False, True):
            np.testing.assert_array_equal(
                kept_by_mass(score, threshold, ties=ties),
                by_sorting(score, threshold, ties=ties),
            )


def test_kept_nodes_hold_the_mass_and_no_smaller_set_does() -> None:
    graph = case_graph("clt")
    influence = graph.influence_N
    keep = kept_by_mass(influence, 0.8, ties=False)
    assert influence[keep].sum() >= 0.8 * influence.sum()
    assert influence[keep].sum() - influence[keep].min() < 0.8 * influence.sum()
    assert influence[keep].min() >= influence[~keep].max()
    fixed = np.arange(len(keep)) >= graph.n_features  # paper mode adds the rest back
    np.testing.assert_array_equal(prune(graph).keep_N, keep | fixed)


@pytest.mark.parametrize("convention", ["paper", "circuit-tracer"])
def test_the_restricted_graph_still_sums(convention: str) -> None:
    """Maths 6.3 after pruning: what dropped nodes gave is in rest, and unexplained."""
    graph = random_graph(2, counts=(8, 8, 8), convention=convention)
    pruning = prune(graph, node_threshold=0.6, edge_threshold=1.0)
    small = restrict(dataclasses.replace(graph, pruning=pruning))
    kept = pruning.keep_N[graph.feature_cols]
    assert small.n_features == kept.sum() < graph.n_features
    assert certificate(small).max_relative_row_error < 5e-15
    rows = np.r_[kept, np.ones(graph.n_targets, bool)]
    np.testing.assert_array_equal(small.readout_R, graph.readout_R[rows])
    added = np.abs(graph.edge_RN[rows][:, ~pruning.keep_N]).sum(1)
    np.testing.assert_allclose(small.rest_abs_R, graph.rest_abs_R[rows] + added)
    if convention == "paper":  # shares are of the full rows either way
        want, got = scores(graph, pruning), scores(solved(small))
        assert got.replacement == pytest.approx(want.replacement, rel=1e-12)
        assert got.completeness == pytest.approx(want.completeness, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_a_threshold_is_a_share(value: float) -> None:
    graph = random_graph(0)
    with pytest.raises(InputError, match="--node-threshold"):
        prune(graph, node_threshold=value)
    with pytest.raises(InputError, match="--edge-threshold"):
        prune(graph, edge_threshold=value)
