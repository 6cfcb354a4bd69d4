"""Graphs of part of the features: the rest is summed, never lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import case, case_graph, close

from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.certificate import certificate
from jaxclt.graph.explore import arrived_influence, next_features
from jaxclt.graph.graph import Graph
from jaxclt.graph.influence import solve_influence

pytestmark = pytest.mark.usefixtures("x64")


def slots(graph: Graph) -> list[tuple[int, int, int]]:
    return list(zip(graph.layer_A, graph.pos_A, graph.feature_A, strict=True))


def place_in_full(part: Graph, full: Graph) -> np.ndarray:
    where = {slot: i for i, slot in enumerate(slots(full))}
    return np.array([where[slot] for slot in slots(part)])


@pytest.mark.parametrize("max_features", [80, 1])
def test_a_partial_graph_is_part_of_the_full_one(max_features: int) -> None:
    """Maths 6.5: its edges are those of the full graph; what is left out is in rest."""
    full = case_graph("clt")
    config = AttributeConfig(
        max_features=max_features, tolerance=0.0, rows_per_update=20
    )
    part = case("clt").graph(config)
    assert part.n_features == max_features
    chosen = place_in_full(part, full)
    assert (np.diff(chosen) > 0).all()
    left_out = np.setdiff1d(np.arange(full.n_features), chosen)
    fixed = np.arange(full.n_features, full.edge_RN.shape[1])
    rows = np.r_[chosen, np.arange(full.n_features, len(full.edge_RN))]
    close(part.edge_RN, full.edge_RN[np.ix_(rows, np.r_[chosen, fixed])], 1e-14)
    missing = full.edge_RN[np.ix_(rows, left_out)]
    close(part.rest_R, missing.sum(1), 1e-13)
    close(part.rest_abs_R, np.abs(missing).sum(1), 1e-13)
    close(part.bias_R, full.bias_R[rows], 1e-14)
    close(part.readout_R, full.readout_R[rows], 0)
    found = certificate(part)
    assert found.max_relative_row_error < 5e-15
    assert found.rest_share > 0


def test_more_features_than_there_are_is_all_of_them() -> None:
    """Maths 10.2: N = all equals the full graph."""
    full = case_graph("clt")
    part = case("clt").graph(
        AttributeConfig(max_features=full.n_features, tolerance=0.0)
    )
    np.testing.assert_array_equal(part.edge_RN, full.edge_RN)
    assert not part.rest_abs_R.any()


def test_exploring_everything_step_by_step_is_the_full_graph() -> None:
    """Maths 10.2: the adaptive order leads to the same rows."""
    full = case_graph("clt")
    config = AttributeConfig(max_features=None, tolerance=1e-12, rows_per_update=60)
    part = case("clt").graph(config)
    chosen = place_in_full(part, full)
    # What was not explored has no influence: its rows could not matter.
    unexplored = np.setdiff1d(np.arange(full.n_features), chosen)
    assert full.influence_N[unexplored].max(initial=0) < 1e-12
    assert len(chosen) > full.n_features / 2
    np.testing.assert_allclose(
        part.influence_N[: len(chosen)], full.influence_N[chosen], rtol=1e-12
    )


def test_exploring_stops_at_the_tolerance() -> None:
    """Less influence than the tolerance rests on features without a row."""
    full = case_graph("clt")
    config = AttributeConfig(
        max_features=None, tolerance=0.2, rows_per_update=10, direction="pull"
    )
    part = case("clt").graph(config)
    assert 0 < part.n_features < full.n_features / 2
    rows, feature_R, total_R, weight_K = parts_of(full)
    known = np.isin(
        feature_R, np.r_[place_in_full(part, full), feature_R[feature_R < 0]]
    )
    visit_A = arrived_influence(
        rows[known], total_R[known], feature_R[known], weight_K, full.layer_A
    )
    left = np.setdiff1d(np.arange(full.n_features), feature_R[known])
    assert 0 < visit_A[left].sum() <= 0.2


def parts_of(full: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    feature_R = np.r_[np.arange(full.n_features), -1 - np.arange(full.n_targets)]
    total_R = np.abs(full.edge_RN).sum(1)
    weight_K = full.target_prob_K / full.target_prob_K.sum()
    return full.edge_RN, feature_R, total_R, weight_K


def test_the_estimate_grows_with_every_row_and_ends_at_the_influence() -> None:
    """Maths 10.2: monotone in the explored set, whatever the order of rows."""
    full = case_graph("clt")
    rows, feature_R, total_R, weight_K = parts_of(full)
    A, K = full.n_features, full.n_targets
    order = np.r_[np.arange(A, A + K), np.argsort(np.sin(np.arange(A) * 7.0))]
    before = np.zeros(A)
    for n in (K, K + 1, K + 20, A // 2, A, A + K):
        some = order[:n]
        visit_A = arrived_influence(
            rows[some], total_R[some], feature_R[some], weight_K, full.layer_A
        )
        assert (visit_A >= before - 1e-15).all()
        assert visit_A.sum() > before.sum()
        before = visit_A
    want = solve_influence(rows, total_R, weight_K)[:A]
    np.testing.assert_allclose(before, want, rtol=1e-12, atol=1e-18)


def test_the_next_features_are_the_strongest_open_ones() -> None:
    visit = np.array([0.5, 0.1, 0.4, 0.3, 0.1])
    open_A = np.array([False, True, True, True, True])
    chosen, unexplored = next_features(visit, open_A, 3)
    assert chosen.tolist() == [1, 2, 3]  # the tie goes to the earlier one
    assert unexplored == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("enough", "want"),
    [(0.0, [1, 2, 3, 4]), (0.05, [1, 2, 3, 4]), (0.1, [1, 2, 3]), (0.3, [2, 3]),
     (0.6, [2]), (2.0, [2])],
)  # fmt: skip
def test_no_more_features_than_bring_the_rest_below_the_tolerance(
    enough: float, want: list[int]
) -> None:
    visit = np.array([0.5, 0.125, 0.4, 0.3, 0.0625])
    open_A = np.array([False, True, True, True, True])
    chosen, unexplored = next_features(visit, open_A, 4, enough=enough)
    assert chosen.tolist() == want
    assert unexplored == pytest.approx(0.8875)
    assert len(next_features(visit, open_A, 2)[0]) == 2


def test_rest_counts_as_unexplained_in_shares() -> None:
    """Rows of a partial graph do not renormalise: shares are of the whole row."""
    full = case_graph("clt")
    part = case("clt").graph(
        AttributeConfig(max_features=80, tolerance=0.0, rows_per_update=20)
    )
    row = part.target_rows.start
    size = np.abs(full.edge_RN[full.target_rows.start]).sum()
    got = np.abs(part.edge_RN[row]).sum() + part.rest_abs_R[row]
    assert got == pytest.approx(size, rel=1e-12)
    chosen = place_in_full(part, full)
    assert (part.influence_N[: len(chosen)] <= full.influence_N[chosen] + 1e-15).all()


def test_circuit_tracer_convention_moves_position_zero_to_rest() -> None:
    """Its features are no nodes, its errors empty, and rows still sum (maths 6.3)."""
    full = case_graph("clt")
    config = AttributeConfig(
        max_features=None, tolerance=0.0, convention="circuit-tracer"
    )
    peer = case("clt").graph(config)
    assert (peer.pos_A > 0).all()
    assert peer.n_features == (full.pos_A > 0).sum()
    error = peer.edge_RN[:, peer.error_cols].reshape(-1, peer.n_layers, peer.n_tokens)
    assert not error[:, :, 0].any()
    assert error[:, :, 1:].any()
    assert certificate(peer).max_relative_row_error < 5e-15
    assert dataclasses.asdict(peer.meta)["convention"] == "circuit-tracer"
