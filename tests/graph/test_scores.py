"""Replacement, completeness and path length against their definitions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import (
    case,
    case_graph,
    random_graph,
    share_matrix,
    solved,
    walk_visits,
)

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph.graph import Graph, Pruning
from jaxclt.graph.prune import prune, restrict
from jaxclt.graph.scores import path_length_curve, scores

pytestmark = pytest.mark.usefixtures("x64")

near = pytest.approx


def by_definition(graph: Graph, pruning: Pruning | None = None) -> dict[str, float]:
    """The formulas of maths 12 term by term, over all nodes, with an inverse."""
    edge_RN = graph.edge_RN
    if pruning is not None:
        edge_RN = np.where(pruning.keep_edge_RN, edge_RN, 0)
    share = share_matrix(graph, edge_RN)
    visit = walk_visits(graph, share)
    A, N, K = graph.n_features, graph.edge_RN.shape[1], graph.n_targets
    row = np.r_[np.arange(A), N + np.arange(K)]
    open_row = row[share_matrix(graph)[row].sum(1) > 0]  # I+ of nodes with inputs
    embed, bias = visit[graph.embed_cols].sum(), visit[N + K]
    explained = np.zeros(len(share), bool)
    explained[:A] = share_matrix(graph)[:A].sum(1) > 0
    explained[graph.embed_cols] = True
    explained[[N + K]] = True
    unexplained_share = 1 - share[:, explained].sum(1)
    lost = visit[open_row] @ unexplained_share[open_row]
    length = visit[open_row].sum()
    return {
        "replacement": embed / (embed + lost),
        "completeness": 1 - lost / length,
        "completeness_ct": 1 - lost / (length + 1),
        "completeness_logit_edges": logit_edges(graph, edge_RN),
        "mean_walk_length": length,
        "embedding_share": embed,
        "error_share": visit[graph.error_cols].sum(),
        "bias_share": bias,
    }


def logit_edges(graph: Graph, edge_RN: np.ndarray) -> float:
    """Maths 12.11: target by target; what is no node counts as error."""
    explained = read = 0.0
    for k, weight in enumerate(graph.target_prob_K.tolist()):
        row = graph.n_features + k
        for s in range(edge_RN.shape[1]):
            read += weight * abs(graph.edge_RN[row, s])
            if s < graph.n_features or s >= graph.embed_cols.start:
                explained += weight * abs(edge_RN[row, s])
        if graph.meta.convention == "paper":
            read += weight * graph.rest_abs_R[row]
    return explained / read


def check_definition(graph: Graph, pruning: Pruning | None = None) -> None:
    got = dataclasses.asdict(scores(graph, pruning))
    for name, want in by_definition(graph, pruning).items():
        assert got[name] == near(want, rel=1e-11, abs=1e-13), name
    endings = ("embedding_share", "error_share", "bias_share", "unexplored_share")
    assert sum(got[name] for name in endings) == near(1, rel=1e-12)
    # Maths 12.4, then 12.3.
    assert 0 <= got["replacement"] <= got["completeness"] <= 1
    assert got["completeness"] <= got["completeness_ct"] <= 1
    lost = got["error_share"] + got["unexplored_share"]
    assert got["completeness"] == near(1 - lost / got["mean_walk_length"], rel=1e-12)


@pytest.mark.parametrize("name", ["clt", "plt", "no_bias"])
def test_scores_are_their_definitions(name: str) -> None:
    """Maths 12.1 to 12.4: the paper's completeness is a ratio over rows with inputs."""
    graph = case_graph(name)
    check_definition(graph)
    check_definition(graph, graph.pruning)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("convention", ["paper", "circuit-tracer"])
def test_scores_with_rest_and_empty_rows_are_their_definitions(
    seed: int, convention: str
) -> None:
    """Maths 12.1 to 12.4 where every class of ending occurs."""
    graph = random_graph(seed, zero_rows=0.25, convention=convention)
    check_definition(graph)
    check_definition(graph, prune(graph, node_threshold=0.6, edge_threshold=0.8))


def keep_features(graph: Graph, keep_A: np.ndarray) -> Pruning:
    """All nodes but some features, and every edge between what is left."""
    keep_N = np.r_[keep_A, np.ones(graph.edge_RN.shape[1] - graph.n_features, bool)]
    keep_R = np.r_[keep_A, np.ones(graph.n_targets, bool)]
    return Pruning(
        keep_N=keep_N,
        keep_edge_RN=keep_R[:, None] & keep_N[None],
        node_threshold=1.0,
        edge_threshold=1.0,
    )


def test_a_graph_cut_to_what_is_kept_has_the_score_of_its_logit_edges() -> None:
    """Pruned nodes count as error, whether they are in the file or not."""
    graph = random_graph(3, counts=(5, 6, 4), bias=True)
    pruning = prune(graph, node_threshold=0.5, edge_threshold=1.0)
    graph = dataclasses.replace(graph, pruning=pruning)
    small = restrict(graph)
    assert small.n_features < graph.n_features
    pruned = scores(graph, pruning).completeness_logit_edges
    assert scores(small).completeness_logit_edges == near(pruned, rel=1e-12)
    assert 0 < pruned < scores(graph).completeness_logit_edges < 1


def test_more_features_explain_more() -> None:
    """Maths 12.6: R + E = 1 for every kept set (no bias), R grows with the set."""
    graph = case_graph("no_bias")
    strongest = np.argsort(-graph.influence_N[: graph.n_features])
    replacement = []
    for n in (0, 1, 10, 60, graph.n_features):
        keep_A = np.zeros(graph.n_features, bool)
        keep_A[strongest[:n]] = True
        got = scores(graph, keep_features(graph, keep_A))
        assert got.embedding_share + got.error_share + got.unexplored_share == near(1)
        assert got.replacement == near(got.embedding_share, rel=1e-12)
        replacement.append(got.replacement)
    assert (np.diff(replacement) > 0).all()
    assert replacement[-1] == near(scores(graph).replacement, rel=1e-12)


def test_without_error_everything_is_explained() -> None:
    """Maths 12.7: the model's own neurons replace it completely."""
    t = case("no_bias")
    active = active_features(NeuronDictionary(), t.params, t.recording, t.cfg)
    graph = t.graph(active=active)
    got = scores(graph)
    assert got.replacement == near(1, abs=1e-12)
    assert got.completeness == near(1, abs=1e-12)
    assert got.error_share < 1e-12


def test_without_features_replacement_is_the_direct_share() -> None:
    """Maths 12.8: only embedding-to-logit edges are left."""
    graph = case_graph("no_bias")
    got = scores(graph, keep_features(graph, np.zeros(graph.n_features, bool)))
    target = np.abs(graph.edge_RN[graph.target_rows])
    weight_K = graph.target_prob_K / graph.target_prob_K.sum()
    direct = weight_K @ (target[:, graph.embed_cols].sum(1) / target.sum(1))
    assert got.replacement == near(direct, rel=1e-12)
    assert got.mean_walk_length == near(1, rel=1e-12)


def test_replacement_is_the_embeddings_influence() -> None:
    """Maths 12.2: with normalised weights and no bias, R normalises path lengths."""
    graph = case_graph("no_bias")
    got = graph.influence_N[graph.embed_cols].sum() / graph.target_prob_K.sum()
    assert scores(graph).replacement == near(got, rel=1e-12)


# -- path length -----------------------------------------------------------------------


def mean_length_by_inverse(graph: Graph) -> float:
    """w A (I - A)^-2 1_E over w A (I - A)^-1 1_E."""
    share = share_matrix(graph)
    visit = walk_visits(graph, share)
    ending = np.zeros(len(share))
    ending[graph.embed_cols] = 1
    reach = np.linalg.solve(np.eye(len(share)) - share, share @ ending)
    return visit @ reach / visit[graph.embed_cols].sum()


@pytest.mark.parametrize("graph", ["clt", "plt", 1, 2], ids=str)
def test_three_forms_of_the_mean_path_length_agree(graph: str | int) -> None:
    """Maths 12.9."""
    graph = case_graph(graph) if isinstance(graph, str) else random_graph(graph)
    curve = path_length_curve(graph)
    assert curve.shape == (graph.n_layers + 1,)
    assert (np.diff(curve) >= 0).all()
    assert curve[-1] == 1
    length = scores(graph).mean_path_length
    assert length == near((1 - np.r_[0, curve[:-1]]).sum(), rel=1e-12)
    assert length == near(mean_length_by_inverse(graph), rel=1e-12)
    assert 1 < length < graph.n_layers + 1


def test_embeddings_that_feed_only_targets_are_one_step_away() -> None:
    """Maths 12.10: only direct embedding edges."""
    graph = random_graph(3)
    edge_RN = graph.edge_RN.copy()
    edge_RN[graph.feature_cols, graph.embed_cols] = 0
    direct = solved(dataclasses.replace(graph, edge_RN=edge_RN))
    assert edge_RN[graph.target_rows, graph.embed_cols].any()
    assert scores(direct).mean_path_length == near(1, rel=1e-12)
    np.testing.assert_allclose(path_length_curve(direct), 1, rtol=1e-12)


def test_without_embedding_paths_there_is_no_length() -> None:
    graph = random_graph(3)
    edge_RN = graph.edge_RN.copy()
    edge_RN[:, graph.embed_cols] = 0
    nothing = solved(dataclasses.replace(graph, edge_RN=edge_RN))
    assert np.isnan(scores(nothing).mean_path_length)
    assert scores(nothing).replacement == 0
    assert not path_length_curve(nothing).any()


def insert(graph: Graph, at: int, edge_RN: np.ndarray, layer: int, row: int) -> Graph:
    """Other edges, for one more feature put at slot `at`; other fields as in `row`."""

    def grown(x: np.ndarray, value: object) -> np.ndarray:
        return np.insert(x, at, value)

    larger = dataclasses.replace(
        graph,
        layer_A=grown(graph.layer_A, layer),
        pos_A=grown(graph.pos_A, graph.pos_A[row]),
        feature_A=grown(graph.feature_A, graph.n_features),
        value_A=grown(graph.value_A, graph.value_A[row]),
        preact_A=grown(graph.preact_A, graph.preact_A[row]),
        attributed_R=grown(graph.attributed_R, True),
        edge_RN=edge_RN,
        bias_R=grown(graph.bias_R, graph.bias_R[row]),
        rest_R=grown(graph.rest_R, graph.rest_R[row]),
        rest_abs_R=grown(graph.rest_abs_R, graph.rest_abs_R[row]),
        readout_R=grown(graph.readout_R, graph.readout_R[row]),
        influence_N=grown(graph.influence_N, 0),
    )
    return solved(larger)


def test_a_duplicate_feature_leaves_lengths_alone() -> None:
    """Maths 12.10: two copies that share their outputs."""
    graph, f = random_graph(9), 5  # a feature of the middle layer
    edge_RN = np.insert(graph.edge_RN, f, graph.edge_RN[f], axis=0)
    edge_RN[:, f] *= 0.25
    edge_RN = np.insert(edge_RN, f, 3 * edge_RN[:, f], axis=1)
    got = insert(graph, f, edge_RN, int(graph.layer_A[f]), f)
    assert scores(got).mean_path_length == near(
        scores(graph).mean_path_length, rel=1e-12
    )
    np.testing.assert_allclose(path_length_curve(got), path_length_curve(graph))


def test_a_relay_adds_its_mass_to_the_length() -> None:
    """Maths 12.10: a feature put between another and everything it feeds."""
    graph, f = random_graph(9, bias=False, rest=False), 2  # of the first layer
    at = 4  # the first slot of the middle layer
    edge_RN = np.insert(graph.edge_RN, at, 0, axis=0)
    edge_RN = np.insert(edge_RN, at, edge_RN[:, f], axis=1)
    edge_RN[:, f] = 0
    edge_RN[at, f] = 1.7
    got = insert(graph, at, edge_RN, 1, f)
    share = share_matrix(graph)
    A = graph.n_features
    ending = np.zeros(len(share))
    ending[graph.embed_cols] = 1
    reach = np.linalg.solve(np.eye(len(share)) - share, ending)
    mass = graph.influence_N[f] / graph.target_prob_K.sum() * reach[f]
    total = graph.influence_N[graph.embed_cols].sum() / graph.target_prob_K.sum()
    assert mass > 0.01
    assert got.n_features == A + 1
    longer = scores(got).mean_path_length - scores(graph).mean_path_length
    assert longer == near(mass / total, rel=1e-10)
