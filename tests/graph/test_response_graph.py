"""A graph that also has edges by response: its other reading, its file, its cuts."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
from cases import close, random_graph, share_matrix, walk_visits

from jaxclt.errors import InputError
from jaxclt.graph.effects import solve_total_effect, total_effects
from jaxclt.graph.graph import Graph
from jaxclt.graph.prune import prune, restrict
from jaxclt.graph.response import by_response
from jaxclt.graph.response_table import PARTS, Response, ResponseParts
from jaxclt.graph.yardstick import total_effect
from jaxclt.io.graph_file import load_graph, save_graph

pytestmark = pytest.mark.usefixtures("x64")


def both_readings(seed: int = 0) -> Graph:
    """A random graph with the edges of another one for its response."""
    graph = random_graph(seed)
    there = graph.edge_RN != 0
    rng = random.Random(seed)

    def normal(*shape: int) -> np.ndarray:
        drawn = [rng.gauss(0, 1) for _ in range(math.prod(shape))]
        return np.array(drawn).reshape(shape)

    edge_RN = normal(*there.shape) * there
    row_E, col_E = (x.astype(np.int32) for x in np.nonzero(there))
    parts = {f"{part}_E": normal(len(row_E)) for part in PARTS}
    rest_R = normal(len(edge_RN))
    return dataclasses.replace(
        graph,
        response=Response(
            edge_RN=edge_RN,
            rest_R=rest_R,
            rest_abs_R=2 * np.abs(rest_R),
            effect_QN=normal(1 + len(PARTS), edge_RN.shape[1]),
            parts=ResponseParts(row_E=row_E, col_E=col_E, **parts),
        ),
        derivative_KN=normal(graph.n_targets, edge_RN.shape[1]),
    )


def test_the_other_reading_is_a_graph() -> None:
    """Maths 22.5: its influence is that of a walk on its edges, without a bias."""
    graph = both_readings()
    other = by_response(graph)
    assert graph.response is not None
    assert other.edge_RN is graph.response.edge_RN
    assert not other.bias_R.any()
    visit = walk_visits(other, share_matrix(other))[: other.edge_RN.shape[1]]
    close(other.influence_N, visit * other.target_prob_K.sum(), 1e-12)
    want = prune(other, node_threshold=1.0, edge_threshold=1.0)
    np.testing.assert_array_equal(other.pruning.keep_N, want.keep_N)
    np.testing.assert_array_equal(other.pruning.keep_edge_RN, want.keep_edge_RN)


def test_a_graph_without_the_other_reading_says_how_to_get_it() -> None:
    with pytest.raises(InputError, match="trace the prompt with --response"):
        by_response(random_graph())
    with pytest.raises(InputError, match="no edges by response"):
        by_response(by_response(both_readings()))


def test_a_smaller_graph_keeps_what_its_rows_lose() -> None:
    graph = both_readings(1)
    graph = dataclasses.replace(graph, pruning=prune(graph, node_threshold=0.5))
    small = restrict(graph)
    full, cut = graph.response, small.response
    assert full is not None
    assert cut is not None
    assert graph.derivative_KN is not None
    assert small.derivative_KN is not None
    keep_N = graph.pruning.keep_N
    row = np.flatnonzero(np.r_[keep_N[: graph.n_features], [True] * graph.n_targets])
    assert len(row) < len(graph.edge_RN)
    # Dropped errors stay columns, empty.
    col = np.flatnonzero(keep_N | (np.arange(len(keep_N)) >= graph.n_features))
    close(cut.edge_RN, (full.edge_RN * keep_N)[np.ix_(row, col)], 0)
    close(cut.edge_RN.sum(1) + cut.rest_R, (full.edge_RN.sum(1) + full.rest_R)[row])
    close(cut.effect_QN, (full.effect_QN * keep_N)[:, col], 0)
    lost_R = (np.abs(full.edge_RN) * ~keep_N).sum(1)[row]
    close(cut.rest_abs_R, full.rest_abs_R[row] + lost_R)
    close(small.derivative_KN, (graph.derivative_KN * keep_N)[:, col], 0)
    stay_E = np.isin(full.parts.row_E, row) & keep_N[full.parts.col_E]
    np.testing.assert_array_equal(row[cut.parts.row_E], full.parts.row_E[stay_E])
    np.testing.assert_array_equal(col[cut.parts.col_E], full.parts.col_E[stay_E])
    close(cut.parts.beside_value, full.parts.beside_value[stay_E], 0)


def test_a_cut_graph_remembers_total_effects_of_the_whole(tmp_path: Path) -> None:
    """Those of both readings, through its file, and when it is cut again."""
    graph = both_readings()
    graph = dataclasses.replace(graph, pruning=prune(graph, node_threshold=0.8))
    small = restrict(graph)
    assert 0 < small.n_features < graph.n_features
    save_graph(tmp_path / "g.npz", small)
    pruning = dataclasses.replace(small.pruning, keep_N=small.pruning.keep_N.copy())
    pruning.keep_N[0] = False
    again = restrict(dataclasses.replace(small, pruning=pruning))
    assert again.n_features == small.n_features - 1
    kept = np.flatnonzero(graph.pruning.keep_N[graph.feature_cols])
    for response in (False, True):
        edge_RN = by_response(graph).edge_RN if response else graph.edge_RN
        A = graph.n_features
        unit = edge_RN[:, :A] / graph.value_A
        want_KA = unit[A:] @ np.linalg.inv(np.eye(A) - unit[:A]) * graph.value_A
        for found, at in ((small, kept), (again, kept[1:])):
            close(total_effects(found, response=response), want_KA[:, at], 1e-9)
        back_KA = total_effects(load_graph(tmp_path / "g.npz"), response=response)
        close(back_KA, want_KA[:, kept], 1e-9)
        assert not np.allclose(solve_total_effect(small), want_KA[:, kept])
    close(total_effect(small), total_effect(graph)[kept], 1e-9)


def test_files_keep_both_readings(tmp_path: Path) -> None:
    graph = both_readings()
    save_graph(tmp_path / "g.npz", graph)
    back = load_graph(tmp_path / "g.npz")
    assert back.response is not None
    assert graph.response is not None
    np.testing.assert_array_equal(back.derivative_KN, graph.derivative_KN)
    for part, whole in ((back.response, graph.response), (back.response.parts, None)):
        whole = whole or graph.response.parts
        for name, x in vars(whole).items():
            if isinstance(x, np.ndarray):
                np.testing.assert_array_equal(getattr(part, name), x)
    save_graph(tmp_path / "old.npz", random_graph())
    old = load_graph(tmp_path / "old.npz")
    assert old.response is old.derivative_KN is None
    assert restrict(old).response is None


@pytest.mark.parametrize(
    "change",
    [
        {"response_RN": np.zeros((2, 2))},
        {"response_rest_R": None},
        {"response_effect_QN": np.zeros((4, 18))},
        {"parts_col_E": np.full(3, 1 << 20, np.int32)},
        {"parts_gate_E": np.zeros(3)},
        {"parts_norm_E": None},
        {"derivative_KN": np.full((2, 18), np.nan)},
    ],
)
def test_files_whose_other_reading_does_not_fit_are_refused(
    change: dict, tmp_path: Path
) -> None:
    save_graph(tmp_path / "g.npz", both_readings())
    with np.load(tmp_path / "g.npz", allow_pickle=False) as file:
        arrays = dict(file) | change
    with (tmp_path / "g.npz").open("wb") as stream:
        np.savez(stream, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(InputError, match="not a complete graph file"):
        load_graph(tmp_path / "g.npz")
