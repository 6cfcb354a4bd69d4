"""Total effects against the model's derivative: the comparison, not the derivative."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import scipy.stats
from cases import close, random_graph

from jaxclt.graph.contrast import contrast
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.graph.response_table import PARTS, Response, ResponseParts
from jaxclt.graph.yardstick import (
    contrast_derivative,
    derivative_agreement,
    hidden_effect,
)
from jaxclt.viewer.graph_json import graph_json, validate

pytestmark = pytest.mark.usefixtures("x64")


def by_inverse(graph: Graph, edge_RN: np.ndarray) -> np.ndarray:
    """Total effects of features on the first target minus the second, [A]."""
    A = graph.n_features
    unit = edge_RN[:, :A] / graph.value_A
    total_KA = unit[A:] @ np.linalg.inv(np.eye(A) - unit[:A]) * graph.value_A
    total_A = total_KA[0] - total_KA[1]
    # What reaches nothing is 0, whose sign counts; an inverse rounds it.
    return np.where(np.abs(total_A) < 1e-12, 0, total_A)


def with_response(graph: Graph, edge_RN: np.ndarray) -> Graph:
    none_E = np.zeros(0, np.int32)
    parts = {f"{part}_E": np.zeros(0) for part in PARTS}
    table = ResponseParts(row_E=none_E, col_E=none_E, **parts)
    rest_R = np.zeros(len(edge_RN))
    response = Response(
        edge_RN=edge_RN,
        rest_R=rest_R,
        rest_abs_R=rest_R,
        effect_QN=np.zeros((1 + len(PARTS), edge_RN.shape[1])),
        parts=table,
    )
    return dataclasses.replace(graph, response=response)


def drawn(seed: int) -> Graph:
    """A graph with a derivative and edges by response that have nothing in common."""
    rng = random.Random(seed)
    graph = random_graph(seed, counts=(6, 9, 7, 8), n_targets=3)

    def normal(*shape: int) -> np.ndarray:
        return np.reshape([rng.gauss(0, 1) for _ in range(math.prod(shape))], shape)

    other = normal(*graph.edge_RN.shape) * (graph.edge_RN != 0)
    derivative_KN = normal(3, graph.edge_RN.shape[1])
    graph = with_response(graph, other)
    return dataclasses.replace(graph, derivative_KN=derivative_KN)


def numbers(total_A: np.ndarray, derivative_A: np.ndarray) -> dict[str, float]:
    order = np.argsort(-np.abs(derivative_A))[: -(-len(derivative_A) // 2)]
    right = np.sign(total_A[order]) == np.sign(derivative_A[order])
    return {
        "spearman": scipy.stats.spearmanr(total_A, derivative_A).statistic,
        "sign": right.mean(),
        "slope": np.linalg.lstsq(total_A[:, None], derivative_A)[0][0],
        "n": len(total_A),
    }


@pytest.mark.parametrize("seed", range(3))
def test_both_readings_against_numpy_and_scipy(seed: int) -> None:
    """Maths 22.42, 22.43."""
    graph = drawn(seed)
    got, after = derivative_agreement(graph), graph.pos_A > 0
    assert got is not None
    assert graph.derivative_KN is not None
    assert graph.response is not None
    derivative_N = graph.derivative_KN[0] - graph.derivative_KN[1]
    derivative_A = derivative_N[: graph.n_features]
    close(contrast_derivative(graph), derivative_N)
    value_A = by_inverse(graph, graph.edge_RN)
    response_A = by_inverse(graph, graph.response.edge_RN)
    close(hidden_effect(graph), derivative_A - response_A, 1e-12)
    for found, total_A in ((got, value_A), (got["by_response"], response_A)):
        for part, of in ((found, slice(None)), (found["after_first"], after)):
            want = numbers(total_A[of], derivative_A[of])
            for name, number in want.items():
                assert abs(part[name] - number) < 1e-6, name
    share = np.abs(derivative_A - response_A).sum() / np.abs(derivative_A).sum()
    assert abs(got["by_response"]["hidden"] - share) < 1e-6


def test_nothing_is_hidden_where_the_response_is_all() -> None:
    graph = with_response(random_graph(4), random_graph(4).edge_RN)
    total_KA = solve_total_effect(graph)
    derivative_KN = np.zeros((2, graph.edge_RN.shape[1]))
    derivative_KN[:, graph.feature_cols] = total_KA
    found = derivative_agreement(
        dataclasses.replace(graph, derivative_KN=derivative_KN)
    )
    assert found is not None
    exact = {"spearman": 1, "sign": 1, "slope": 1, "n": graph.n_features}
    assert {name: found[name] for name in exact} == exact
    assert {name: found["by_response"][name] for name in exact} == exact
    assert found["by_response"]["hidden"] == 0


def test_what_a_graph_does_not_have_is_not_compared() -> None:
    graph = random_graph()
    assert derivative_agreement(graph) is None
    derivative_KN = np.ones((2, graph.edge_RN.shape[1]))
    graph = dataclasses.replace(graph, derivative_KN=derivative_KN)
    found = derivative_agreement(graph)  # equal for both targets: the contrast is zero
    assert found is not None
    assert "by_response" not in found
    assert found["spearman"] is None
    assert hidden_effect(graph) is None


def test_the_contrast_is_of_two_tokens_at_one_place() -> None:
    graph = random_graph(n_targets=3)

    def of(**changes: object) -> tuple[list[float], str]:
        made = contrast(dataclasses.replace(graph, **changes))  # pyright: ignore
        return made.weight_K.tolist(), made.text

    first = [1, 0, 0]
    assert of() == ([1, -1, 0], "logit(k0) - logit(k1)")
    token_K, layer_K, pos_K = (np.array(x) for x in ([5, -1, 7], [3, 2, 3], [2, 1, 2]))
    assert of(target_token_K=token_K) == (first, "logit(k0)")
    assert of(target_token_K=-np.abs(token_K)) == (first, "k0")
    assert of(target_pos_K=pos_K) == (first, "logit(k0)")
    assert of(target_layer_K=layer_K) == (first, "logit(k0)")
    alone = random_graph(n_targets=1)
    assert contrast(alone).weight_K.tolist() == [1]


def test_nodes_of_the_json_say_it() -> None:
    graph = drawn(1)
    doc = graph_json(graph, slug="g")
    validate(doc)
    derivative_N, hidden_A = contrast_derivative(graph), hidden_effect(graph)
    assert derivative_N is not None
    assert hidden_A is not None
    kinds = dict.fromkeys(("derivative", "hidden"), 0)
    for node in doc["nodes"]:
        for name in kinds:
            kinds[name] += name in node
    assert kinds == {"derivative": len(derivative_N), "hidden": len(hidden_A)}
    features = [node for node in doc["nodes"] if "hidden" in node]
    for node, d, h in zip(features, derivative_N, hidden_A, strict=False):
        assert abs(node["derivative"] - d) < 1e-3 * abs(d)
        assert abs(node["hidden"] - h) < 1e-3 * abs(h)
    bare = graph_json(random_graph(), slug="g")
    assert not any("derivative" in node for node in bare["nodes"])
