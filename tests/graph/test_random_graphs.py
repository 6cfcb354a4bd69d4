"""Hypothesis: random layered graphs of every shape, pruned and scored."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from cases import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclt.graph.graph import Graph
from jaxclt.graph.prune import kept_by_mass, prune
from jaxclt.graph.scores import path_length_curve, scores

pytestmark = pytest.mark.usefixtures("x64")
quick = settings(deadline=None, derandomize=True, max_examples=30)


@st.composite
def graphs(draw: st.DrawFn, convention: str = "paper") -> Graph:
    """Layers without features, empty rows and sparse graphs included."""
    counts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    with jax.enable_x64(True):
        return random_graph(
            draw(st.integers(0, 10**6)),
            counts=tuple(counts),
            n_tokens=draw(st.integers(1, 4)),
            n_targets=draw(st.integers(1, 3)),
            density=draw(st.sampled_from([0.15, 0.5, 1.0])),
            bias=draw(st.booleans()),
            rest=draw(st.booleans()),
            zero_rows=draw(st.sampled_from([0.0, 0.3, 1.0])),
            convention=convention,
        )


thresholds = st.floats(0.05, 1.0)


@quick
@given(graphs(), thresholds, thresholds, thresholds)
def test_pruning_is_monotone_and_consistent(
    graph: Graph, x: float, y: float, edge: float
) -> None:
    """Maths 11.3, 11.4: sets grow with thresholds; no edge touches a dropped node."""
    low, high = sorted((x, y))
    small = prune(graph, node_threshold=low, edge_threshold=edge)
    large = prune(graph, node_threshold=high, edge_threshold=edge)
    assert not (small.keep_N & ~large.keep_N).any()
    fewer = prune(graph, node_threshold=high, edge_threshold=low)
    more = prune(graph, node_threshold=high, edge_threshold=high)
    assert not (fewer.keep_edge_RN & ~more.keep_edge_RN).any()
    for pruning in (small, large, fewer, more):
        assert pruning.keep_N[graph.embed_cols].all()
        assert pruning.keep_N[graph.error_cols].all()
        dropped = ~pruning.keep_N
        assert not pruning.keep_edge_RN[:, dropped].any()
        assert not pruning.keep_edge_RN[: graph.n_features][
            dropped[graph.feature_cols]
        ].any()
        assert not (pruning.keep_edge_RN & (graph.edge_RN == 0)).any()


@quick
@given(graphs(), thresholds)
def test_pruning_what_is_pruned_at_one_drops_nothing(graph: Graph, x: float) -> None:
    """Idempotent node set: what was kept for its mass is kept again, all of it."""
    first = kept_by_mass(graph.influence_N, x, ties=False)
    left = np.where(first, graph.influence_N, 0)
    np.testing.assert_array_equal(kept_by_mass(left, 1.0, ties=False), first)
    once = prune(graph, node_threshold=x)
    again = prune(dataclasses.replace(graph, pruning=once), node_threshold=x)
    np.testing.assert_array_equal(once.keep_N, again.keep_N)
    np.testing.assert_array_equal(once.keep_edge_RN, again.keep_edge_RN)


@quick
@given(graphs("circuit-tracer"), thresholds, thresholds)
def test_circuit_tracer_mode_has_no_dead_ends(
    graph: Graph, node: float, edge: float
) -> None:
    """Maths 11.5."""
    got = prune(graph, node_threshold=node, edge_threshold=edge)
    A = graph.n_features
    kept = got.keep_N[:A]
    assert got.keep_edge_RN[:A].any(1)[kept].all()
    assert got.keep_edge_RN.any(0)[:A][kept].all()
    assert not got.keep_edge_RN[:, ~got.keep_N].any()
    assert not got.keep_edge_RN[:A][~kept].any()


@quick
@given(graphs(), thresholds, thresholds)
def test_scores_of_any_graph_are_ordered_shares(
    graph: Graph, node: float, edge: float
) -> None:
    """Maths 12.1, 12.3, 12.4, 12.6: R <= C = 1 - E / length, and pruning loses."""
    full = scores(graph)
    part = scores(graph, prune(graph, node_threshold=node, edge_threshold=edge))
    for got in (full, part):
        lost = got.error_share + got.unexplored_share
        ending = got.embedding_share + got.bias_share + lost
        assert ending == pytest.approx(1, abs=1e-12)
        assert -1e-12 <= got.replacement <= got.completeness + 1e-12 <= 1 + 2e-12
        want = 1 - lost / got.mean_walk_length
        assert got.completeness == pytest.approx(want, abs=1e-12)
        assert got.mean_walk_length >= 1 - 1e-12
        if got.embedding_share > 1e-9:
            assert 1 - 1e-9 <= got.mean_path_length <= graph.n_layers + 1 + 1e-9
    assert part.replacement <= full.replacement + 1e-12
    assert part.embedding_share <= full.embedding_share + 1e-12


@quick
@given(st.integers(0, 10**6))
def test_curve_and_solve_agree_on_any_graph(seed: int) -> None:
    """Maths 12.9; one shape, since the series compiles per shape."""
    graph = random_graph(seed, density=0.4)
    curve = path_length_curve(graph)
    assert (np.diff(curve) >= -1e-15).all()
    if curve[-1] > 0:
        want = (1 - np.r_[0, curve[:-1]]).sum()
        assert scores(graph).mean_path_length == pytest.approx(want, rel=1e-11)
