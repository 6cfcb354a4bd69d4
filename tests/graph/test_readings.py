"""What takes a graph takes either reading of it, or says why not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import close, share_matrix, walk_visits
from test_response_graph import both_readings

import jaxclt
from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.response_table import PARTS, Response
from jaxclt.graph.shares import shares_total

pytestmark = pytest.mark.usefixtures("x64")


def response_of(graph: Graph) -> Response:
    assert graph.response is not None
    return graph.response


def test_influence_paths_groups_and_effects_take_the_other_reading() -> None:
    """Maths 22.80: each is its own definition, with the response for edges."""
    graph = both_readings()
    other = jaxclt.by_response(graph)
    A, N = graph.n_features, graph.edge_RN.shape[1]
    edge_RN = response_of(graph).edge_RN
    unit_RA = edge_RN[:, :A] / graph.value_A
    total_KA = unit_RA[A:] @ np.linalg.inv(np.eye(A) - unit_RA[:A]) * graph.value_A
    close(jaxclt.solve_total_effect(other), total_KA, 1e-11)

    size_RN = np.abs(edge_RN)
    whole_R = size_RN.sum(1) + response_of(graph).rest_abs_R
    close(shares_total(other), whole_R)
    visit_X = walk_visits(other, share_matrix(other))
    score = jaxclt.scores(other)
    is_input_N, is_error_N = (other.layout.ends(end) for end in ("input", "error"))
    embedding, error = (visit_X[:N][ends].sum() for ends in (is_input_N, is_error_N))
    close([score.embedding_share, score.error_share], [embedding, error], 1e-12)
    assert score.bias_share == 0
    # Walks end in a token, in an error, or in what is no node.
    assert score.unexplored_share == pytest.approx(1 - embedding - error)

    paths = jaxclt.strongest_paths(other, k=10_000)
    strength = sum(path.strength for path in paths)
    assert strength == pytest.approx(embedding * graph.target_prob_K.sum())
    signed = jaxclt.strongest_paths(other, start=0, end=A, k=10_000, share=False)
    assert sum(p.sign * p.strength for p in signed) == pytest.approx(total_KA[0, 0])

    groups = jaxclt.suggest_supernodes(other, distance=0.0)
    small = jaxclt.supernode_graph(other, groups)
    assert small.replacement == pytest.approx(
        jaxclt.scores(other, other.pruning).replacement
    )
    kept = jaxclt.prune(other, node_threshold=0.5)
    assert kept.n_features < A
    lost = kept.edge_RN.sum(1) + kept.rest_R
    whole = edge_RN.sum(1) + response_of(graph).rest_R
    place = {graph.feature(a): a for a in range(A)}
    same = [place[kept.feature(a)] for a in range(kept.n_features)]
    close(lost, whole[[*same, *range(A, A + graph.n_targets)]], 1e-12)


def test_what_holds_by_value_alone_is_refused_by_response() -> None:
    other = jaxclt.by_response(both_readings())
    with pytest.raises(InputError, match="sum to nothing"):
        jaxclt.certificate(other)
    with pytest.raises(InputError, match="both readings"):
        jaxclt.edge_parts(other, "embed 0", "0")
    assert "certificate" not in jaxclt.show(other).doc["jaxclt"]["scores"]
    assert jaxclt.show(other).doc["jaxclt"]["reading"] == "response"


def test_explain_says_both_readings() -> None:
    graph = both_readings()
    response = response_of(graph)
    row, col = int(response.parts.row_E[-1]), int(response.parts.col_E[-1])
    names = (
        jaxclt.node_name(graph, col),
        jaxclt.node_name(graph, graph.layout.node_of(row)),
    )
    found = jaxclt.edge_parts(graph, *names)
    assert found.response is not None
    assert found.response.total == response.edge_RN[row, col]
    sizes = {part: getattr(response.parts, f"{part}_E")[-1] for part in PARTS}
    for part, size in sizes.items():
        assert getattr(found.response, part) == size
    text = found.text()
    for name, size in {"  as by value": found.edge, "  query": sizes["query"]}.items():
        share = size / response.edge_RN[row, col]
        assert f"{name:<20} {size:+12.4g} {share:8.1%}" in text.splitlines()

    # An edge that attention patterns alone make: no value travels along it.
    edge_RN = graph.edge_RN.copy()
    edge_RN[row, col] = 0
    silent = dataclasses.replace(graph, edge_RN=edge_RN)
    assert jaxclt.edge_parts(silent, *names).edge == 0
    assert f"{'edge':<20} {0:+12.4g}" in jaxclt.explain(silent, *names).splitlines()
    with pytest.raises(InputError, match="no edge"):
        jaxclt.edge_parts(dataclasses.replace(silent, response=None), *names)

    few = response.parts.restrict(
        np.arange(len(edge_RN) - 1),
        np.arange(len(graph.influence_N)),
        np.ones(99, bool),
    )
    unlisted = dataclasses.replace(response, parts=few)
    text = jaxclt.explain(dataclasses.replace(graph, response=unlisted), *names)
    assert "response" in text
    assert "query" not in text
