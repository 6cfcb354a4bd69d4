"""The guarantee of `tolerance`: what a truncated graph can be off by, and no more.

The statements and their proofs are in `jaxclt.graph.scores`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_graph, solved
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.graph.prune import kept_by_mass, prune, restrict
from jaxclt.graph.scores import scores
from jaxclt.testing import Tiny, tiny

pytestmark = pytest.mark.usefixtures("x64")
EPS = 1e-12


def columns(exact: Graph, part: Graph) -> np.ndarray:
    """Where the columns of a truncated graph are in the exact one."""
    place = {
        slot: i
        for i, slot in enumerate(
            zip(exact.layer_A, exact.pos_A, exact.feature_A, strict=True)
        )
    }
    slots = zip(part.layer_A, part.pos_A, part.feature_A, strict=True)
    found = np.array([place[slot] for slot in slots], int)
    return np.r_[found, np.arange(exact.n_features, exact.edge_RN.shape[1])]


def check_bounds(exact: Graph, part: Graph) -> None:
    """Influence of every node, and scores."""
    true, known = scores(exact), scores(part)
    U, W = known.unexplored_share, float(exact.target_prob_K.sum())
    influence_N = np.zeros(exact.edge_RN.shape[1])  # none for what is left out
    influence_N[columns(exact, part)] = part.influence_N
    gain_N = exact.influence_N - influence_N
    assert gain_N.min() >= -EPS
    assert gain_N.max() <= U * W + EPS
    assert known.replacement <= true.replacement + EPS
    assert true.replacement <= known.replacement_at_most + EPS
    assert known.completeness <= true.completeness + EPS
    assert true.completeness <= known.completeness_at_most + EPS
    limit = known.replacement + U / max(1 - known.bias_share, 1e-30)
    assert known.replacement_at_most <= min(1, limit) + EPS
    assert true.replacement_at_most == true.replacement


def check_kept(exact: Graph, part: Graph, threshold: float) -> None:
    """Nodes kept by one graph and not by the other are next to the threshold."""
    W = float(exact.target_prob_K.sum())
    U = scores(part).unexplored_share
    influence_N = np.zeros_like(exact.influence_N)
    influence_N[columns(exact, part)] = part.influence_N
    off = (exact.n_layers + 1) * U * W
    assert exact.influence_N.sum() - influence_N.sum() <= off + EPS
    for one, other in (
        (exact.influence_N, influence_N),
        (influence_N, exact.influence_N),
    ):
        total = max(other.sum(), 1e-30)
        kept = kept_by_mass(one, threshold, ties=False)
        for node in np.flatnonzero(kept & ~kept_by_mass(other, threshold, ties=False)):
            ahead = other[other > other[node] + U * W + EPS].sum()
            assert ahead / total <= threshold + off / total + EPS


@st.composite
def truncated(draw: st.DrawFn) -> tuple[Graph, Graph]:
    """A random graph without a rest, and the same with some features unexplored."""
    counts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    with jax.enable_x64(True):
        exact = random_graph(
            draw(st.integers(0, 10**6)),
            counts=tuple(counts),
            n_tokens=draw(st.integers(1, 3)),
            density=draw(st.sampled_from([0.15, 0.5, 1.0])),
            bias=draw(st.booleans()),
            rest=False,
            zero_rows=draw(st.sampled_from([0.0, 0.3])),
        )
        subset = draw(st.integers(0, 2**28 - 1))
        keep_N = np.ones(len(exact.influence_N), bool)
        keep_N[: exact.n_features] = [
            bool(subset >> i & 1) for i in range(exact.n_features)
        ]
        pruning = dataclasses.replace(exact.pruning, keep_N=keep_N)
        return exact, solved(restrict(dataclasses.replace(exact, pruning=pruning)))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(truncated(), st.floats(0.05, 0.99))
def test_any_set_of_explored_features_is_within_its_bound(
    pair: tuple[Graph, Graph], threshold: float
) -> None:
    exact, part = pair
    check_bounds(exact, part)
    check_kept(exact, part, threshold)


@functools.cache
def model(seed: int) -> tuple[Tiny, Graph]:
    with jax.enable_x64(True):
        made = tiny(seed, dtype=jnp.float64)
        return made, made.graph()


@settings(deadline=None, derandomize=True, max_examples=8)
@given(st.integers(0, 3), st.sampled_from([0.01, 0.02, 0.05, 0.3]))
def test_the_bound_holds_on_random_models(seed: int, tolerance: float) -> None:
    """What `attribute` stops at, against the graph with every row."""
    made, exact = model(seed)
    config = AttributeConfig(max_features=None, tolerance=tolerance, rows_per_update=16)
    part = made.graph(config)
    assert scores(part).unexplored_share <= tolerance
    check_bounds(exact, part)
    check_kept(exact, part, 0.8)


def test_the_bound_shrinks_as_the_tolerance_does() -> None:
    """Maths 10.2: estimates of influence and scores only grow, to the exact ones."""
    made, exact = model(0)
    before: tuple[float, ...] = (0.0, 0.0)
    influence_N = np.zeros(exact.edge_RN.shape[1])
    for tolerance in (0.3, 0.05, 0.01, 0.0):
        config = AttributeConfig(
            max_features=None, tolerance=tolerance, rows_per_update=16
        )
        part = made.graph(config)
        now = np.zeros_like(influence_N)
        now[columns(exact, part)] = part.influence_N
        assert (now >= influence_N - EPS).all()
        found = scores(part)
        after = (found.replacement, found.completeness)
        assert all(a <= b + EPS for a, b in zip(before, after, strict=True))
        before, influence_N = after, now
    np.testing.assert_array_equal(part.edge_RN, exact.edge_RN)
    assert part.influence_N.tolist() == exact.influence_N.tolist()
    assert scores(part).unexplored_share == 0
    assert scores(part).replacement_at_most == scores(part).replacement


def test_what_circuit_tracer_leaves_out_has_no_bound() -> None:
    """Its shares are of the explored sources only, so nothing better than 1 is said."""
    meta = dataclasses.replace(random_graph(1).meta, convention="circuit-tracer")
    graph = solved(dataclasses.replace(random_graph(1), meta=meta))
    found = scores(graph)
    assert graph.rest_abs_R.any()
    assert found.replacement_at_most == found.completeness_at_most == 1


def test_scores_of_a_pruned_graph_need_no_bound() -> None:
    """The same nodes and edges have the same scores in the exact graph."""
    made, exact = model(1)
    config = AttributeConfig(max_features=None, tolerance=0.05, rows_per_update=16)
    part = made.graph(config)
    small = prune(part, node_threshold=0.6, edge_threshold=0.9)
    col = columns(exact, part)
    row = np.r_[col[: part.n_features], exact.n_features + np.arange(exact.n_targets)]
    keep_N = np.zeros(exact.edge_RN.shape[1], bool)
    keep_N[col] = small.keep_N
    keep_edge_RN = np.zeros(exact.edge_RN.shape, bool)
    keep_edge_RN[np.ix_(row, col)] = small.keep_edge_RN
    same = dataclasses.replace(small, keep_N=keep_N, keep_edge_RN=keep_edge_RN)
    want = dataclasses.asdict(scores(exact, same))
    assert dataclasses.asdict(scores(part, small)) == pytest.approx(want, rel=1e-11)
