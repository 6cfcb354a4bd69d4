"""Graph measures of an evaluation: what passed attention, and the frontier."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cases import case, random_graph, share_matrix, solved, walk_visits

from jaxclt.evaluation.graphs import attention_share, frontier, graph_row
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.prune import prune
from jaxclt.graph.scores import scores

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module", params=["clt", "skip", "half"])
def graph(request: pytest.FixtureRequest, x64: None):
    config = AttributeConfig(
        max_features=30 if request.param == "half" else None, tolerance=0.0, devices=1
    )
    name = "clt" if request.param == "half" else request.param
    return case(name).graph(config)


def test_attention_share_is_that_of_a_walk_that_remembers(graph):
    """Against the walk on pairs (node, whether a head was passed)."""
    direct_RN = graph.edge_direct_RN
    both_RN = np.abs(direct_RN) + np.abs(graph.edge_RN - direct_RN)
    f_RN = np.abs(direct_RN) / np.where(both_RN > 0, both_RN, 1)
    share = share_matrix(graph)
    stay = share_matrix(graph, graph.edge_RN * f_RN)
    n = len(share)
    # bias and rest are no ends here, so it does not matter how they are reached
    double = np.block([[stay, share - stay], [np.zeros((n, n)), share]])
    start = np.zeros(2 * n)
    N = graph.edge_RN.shape[1]
    weight_K = graph.target_prob_K.astype(np.float64)
    start[N : N + graph.n_targets] = weight_K / weight_K.sum()
    visit = start @ np.linalg.inv(np.eye(2 * n) - double)
    for found, cols in zip(
        attention_share(graph),
        (np.r_[graph.error_cols, graph.embed_cols], np.r_[graph.embed_cols]),
        strict=True,
    ):
        want = visit[n + cols].sum() / (visit[cols] + visit[n + cols]).sum()
        assert 0 < found < 1
        assert found == pytest.approx(want, rel=1e-9)
    np.testing.assert_allclose(
        visit[:N] + visit[n : n + N], walk_visits(graph, share)[:N], atol=1e-12
    )


def test_frontier_is_the_scores_of_each_pruning(graph):
    steps = frontier(graph, (0.95, 0.8, 0.5))
    for step in steps:
        kept = prune(graph, node_threshold=step["threshold"])
        found = scores(graph, kept)
        assert step["completeness"] == found.completeness
        assert step["replacement"] == found.replacement
        assert step["nodes"] == kept.keep_N[graph.feature_cols].sum()
        assert step["edges"] == kept.keep_edge_RN.sum()
    nodes = [step["nodes"] for step in steps]
    assert nodes == sorted(nodes, reverse=True)


def test_a_row_is_json(graph):
    row = graph_row(graph)
    assert json.loads(json.dumps(row)) == row
    assert len(row["curve"]) == graph.n_layers + 1
    assert row["scores"]["completeness"] == scores(graph).completeness


def test_a_graph_that_does_not_say_has_no_share():
    graph = solved(random_graph(0))
    assert graph.direct_RN is None
    assert np.isnan(attention_share(graph)).all()
