"""Supernode graphs against their formula (maths 13.3), and the groups suggested."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from cases import case_graph, random_graph, share_matrix, solved, walk_visits

import jaxclt
from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.prune import prune
from jaxclt.graph.scores import scores
from jaxclt.graph.supernodes import (
    SupernodeGraph,
    describe_supernodes,
    input_by_token,
    suggest_supernodes,
    supernode_graph,
)
from jaxclt.patching.edits import expand_edits
from jaxclt.types import Supernode

pytestmark = pytest.mark.usefixtures("x64")

near = pytest.approx


def name_of(graph: Graph, i: int) -> tuple[int, int, int] | str:
    """A member as a user writes it: the triple of a feature, else a name."""
    N, A, T = graph.edge_RN.shape[1], graph.n_features, graph.n_tokens
    if i >= N:
        return f"target {i - N}"
    if i >= graph.embed_cols.start:
        return f"embed {i - graph.embed_cols.start}"
    if i >= A:
        return "error {}:{}".format(*divmod(i - A, T))
    at = graph.layer_A[i], graph.pos_A[i], graph.feature_A[i]
    return int(at[0]), int(at[1]), int(at[2])


def groups_of(graph: Graph, label_X: np.ndarray) -> list[Supernode]:
    """Groups by label, one per node of the graph and target; -1 is ungrouped."""
    return [
        Supernode(
            f"g{g}",
            tuple(name_of(graph, int(i)) for i in np.flatnonzero(label_X == g)),
        )
        for g in range(label_X.max() + 1)
        if (label_X == g).any()
    ]


def random_labels(graph: Graph, seed: int, n: int) -> np.ndarray:
    """Every node of the graph and every target in one of at most n groups."""
    rng = random.Random(seed)
    X = graph.edge_RN.shape[1] + graph.n_targets
    label_X = np.array([rng.randrange(n) for _ in range(X)])
    return np.unique(label_X, return_inverse=True)[1]


def signed_share(graph: Graph) -> np.ndarray:
    """A' over columns and targets: signed edges over the absolute sum of their row."""
    N = graph.edge_RN.shape[1]
    total = np.abs(graph.edge_RN).sum(1) + np.abs(graph.bias_R) + graph.rest_abs_R
    share = np.zeros((N + graph.n_targets,) * 2)
    row = np.r_[np.arange(graph.n_features), N + np.arange(graph.n_targets)]
    share[row, :N] = graph.edge_RN / np.where(total > 0, total, 1)[:, None]
    return share


def by_formula(
    graph: Graph, groups: list[np.ndarray], norm: str = "total"
) -> np.ndarray:
    """The sums of maths 13.3, one by one."""
    share = signed_share(graph)
    full = share_matrix(graph)[: len(share)]
    out = np.zeros((len(groups),) * 2)
    for t, into in enumerate(groups):
        outside = {n: full[n].sum() - full[n, into].sum() for n in into}
        total_f = sum(outside.values())
        for s, source in enumerate(groups):
            if norm == "external" and s == t:
                continue
            for n, f in outside.items():
                if total_f > 1e-12 and f > 1e-12:
                    size = 1.0 if norm == "total" else f
                    out[t, s] += f * share[n, source].sum() / size / total_f
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", ["total", "external"])
def test_links_are_the_formula(seed: int, norm: str) -> None:
    graph = random_graph(seed, zero_rows=0.2)
    label_X = random_labels(graph, seed, 6)
    label_X[:3] = -1  # some ungrouped
    label_X = np.unique(label_X, return_inverse=True)[1] - 1
    groups = groups_of(graph, label_X)
    small = supernode_graph(graph, groups, norm=norm)  # pyright: ignore
    members = [np.flatnonzero(label_X == g) for g in range(len(groups))]
    assert all((a == b).all() for a, b in zip(small.members, members, strict=True))
    np.testing.assert_allclose(
        small.edge_GG, by_formula(graph, members, norm), atol=1e-14
    )


@pytest.mark.parametrize("convention", ["paper", "circuit-tracer"])
def test_groups_of_one_are_the_graph(convention: str) -> None:
    """Maths 13.4: links are normalised edges, scores those of the graph, no blur."""
    graph = random_graph(1, zero_rows=0.2, convention=convention)
    X = graph.edge_RN.shape[1] + graph.n_targets
    small = supernode_graph(graph, groups_of(graph, np.arange(X)))
    np.testing.assert_allclose(small.size_GG, share_matrix(graph)[:X, :X], atol=1e-15)
    sign = np.sign(small.edge_GG) * (small.size_GG > 0)
    np.testing.assert_allclose(small.edge_GG, sign * small.size_GG, atol=1e-15)
    assert small.blur == near(0, abs=1e-13)
    assert small.replacement == near(scores(graph).replacement, rel=1e-12)
    visits = walk_visits(graph, share_matrix(graph))[:X]
    np.testing.assert_allclose(small.influence_G, visits, atol=1e-13)


def test_groups_of_one_on_a_traced_graph() -> None:
    """Maths 13.4 where edges come from a model."""
    graph = case_graph("clt")
    X = graph.edge_RN.shape[1] + graph.n_targets
    small = supernode_graph(graph, groups_of(graph, np.arange(X)))
    np.testing.assert_allclose(small.size_GG, share_matrix(graph)[:X, :X], atol=1e-13)
    assert small.completeness == near(scores(graph).completeness, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_shares_of_a_partition_sum_to_one(seed: int) -> None:
    """Maths 13.5: nothing but bias and rest is missing; here there is neither."""
    graph = random_graph(seed, bias=False, rest=False, zero_rows=0.2)
    groups = groups_of(graph, random_labels(graph, seed, 7))
    small = supernode_graph(graph, groups)
    fed = small.outside_G > 0
    assert fed.any()
    np.testing.assert_allclose(small.size_GG.sum(1), fed.astype(float), rtol=1e-13)
    outer = supernode_graph(graph, groups, norm="external")
    np.testing.assert_allclose(outer.size_GG.sum(1), fed.astype(float), rtol=1e-13)
    assert (np.diag(outer.size_GG) == 0).all()


def split(graph: Graph, a: int) -> Graph:
    """Feature a as two nodes side by side, each with half of its edges."""
    A, edge_RN = graph.n_features, graph.edge_RN.copy()
    edge_RN[:, a] /= 2
    col = np.r_[np.arange(a + 1), a, np.arange(a + 1, edge_RN.shape[1])]
    row = np.r_[np.arange(a + 1), a, np.arange(a + 1, len(edge_RN))]
    own = row[: A + 1]
    made = {name: getattr(graph, name)[own] for name in (
        "layer_A", "pos_A", "value_A", "preact_A")}  # fmt: skip
    feature_A = graph.feature_A[own].copy()
    feature_A[a + 1] = 999
    rows = ("attributed_R", "bias_R", "rest_R", "rest_abs_R", "readout_R")
    return solved(
        dataclasses.replace(
            graph,
            **made,
            **{name: getattr(graph, name)[row] for name in rows},
            feature_A=feature_A,
            edge_RN=edge_RN[row][:, col],
            influence_N=graph.influence_N[col],
            pruning=dataclasses.replace(
                graph.pruning,
                keep_N=graph.pruning.keep_N[col],
                keep_edge_RN=graph.pruning.keep_edge_RN[row][:, col],
            ),
        )
    )


def test_splitting_a_source_changes_nothing_downstream() -> None:
    """Maths 13.6."""
    graph, a = random_graph(2), 2
    label_X = random_labels(graph, 5, 5)
    small = supernode_graph(graph, groups_of(graph, label_X))
    twice = np.insert(label_X, a + 1, label_X[a])
    other = supernode_graph(split(graph, a), groups_of(split(graph, a), twice))
    rows = np.arange(len(small.names)) != label_X[a]
    np.testing.assert_allclose(other.edge_GG[rows], small.edge_GG[rows], atol=1e-14)
    assert other.replacement == near(small.replacement, rel=1e-12)


def test_grouping_by_visits_keeps_the_walk() -> None:
    """Scores do not ask how features are grouped: contraction by visits is exact."""
    graph = random_graph(3, bias=False)
    label_X = random_labels(graph, 3, 6)
    label_X[graph.embed_cols] = label_X.max() + 1  # tokens are a group
    label_X = np.unique(label_X, return_inverse=True)[1]
    share = share_matrix(graph)
    visit = walk_visits(graph, share)
    X, G = len(label_X), int(label_X.max()) + 1
    one_XG = (label_X[:, None] == np.arange(G)).astype(float)
    weight_XG = visit[:X, None] * one_XG
    step_GG = (weight_XG / weight_XG.sum(0)).T @ share[:X, :X] @ one_XG
    start_G = np.zeros(X)
    start_G[-graph.n_targets :] = graph.target_prob_K / graph.target_prob_K.sum()
    visit_G = (start_G @ one_XG) @ np.linalg.inv(np.eye(G) - step_GG)
    np.testing.assert_allclose(visit_G, visit[:X] @ one_XG, rtol=1e-12)
    small = supernode_graph(graph, groups_of(graph, label_X))
    np.testing.assert_allclose(small.influence_G, visit_G, rtol=1e-12)
    assert small.replacement == near(visit_G[label_X.max()], rel=1e-12)
    assert small.replacement == near(scores(graph).replacement, rel=1e-12)
    assert small.blur > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_ungrouped_features_are_error(seed: int) -> None:
    """The absorbing rule: as if everything else were pruned, nothing renormalised."""
    graph = random_graph(seed, counts=(5, 5, 5))
    label_X = np.full(graph.edge_RN.shape[1] + graph.n_targets, -1)
    few = prune(graph, node_threshold=0.5, edge_threshold=1.0).keep_N[
        graph.feature_cols
    ]
    assert 1 < few.sum() < len(few)
    label_X[np.flatnonzero(few)] = np.arange(few.sum()) % 2
    small = supernode_graph(graph, groups_of(graph, label_X))
    keep_N = np.ones(graph.edge_RN.shape[1], bool)
    keep_N[graph.feature_cols] = few
    keep_R = np.r_[few, np.ones(graph.n_targets, bool)]
    want = scores(
        graph,
        dataclasses.replace(
            graph.pruning, keep_N=keep_N, keep_edge_RN=keep_R[:, None] & keep_N[None]
        ),
    )
    assert small.replacement == near(want.replacement, rel=1e-12)
    assert small.completeness == near(want.completeness, rel=1e-12)
    assert small.replacement < scores(graph).replacement


def chain() -> Graph:
    """token 0 -> feature 0 -> feature 1 -> target, and nothing else."""
    graph = random_graph(
        0, counts=(1, 1), n_tokens=1, n_targets=1, bias=False, rest=False
    )
    edge_RN = np.zeros_like(graph.edge_RN)
    edge_RN[0, graph.embed_cols.start] = 2.0
    edge_RN[1, 0] = -3.0
    edge_RN[2, 1] = 4.0
    return solved(dataclasses.replace(graph, edge_RN=edge_RN))


def test_a_closed_group_has_no_links_to_it() -> None:
    """f = 0 for all members: 0 / 0 is 0, also when members do have inputs."""
    closed = Supernode("closed", ((0, 0, 0), (1, 0, 1), "embed 0"))
    small = supernode_graph(chain(), [closed, Supernode("end", ("target 0",))])
    assert (small.edge_GG[0] == 0).all()
    assert small.outside_G.tolist() == [0, 1]
    assert small.edge_GG[1].tolist() == [1, 0]
    assert small.replacement == 1


def test_single_tokens_errors_and_targets() -> None:
    graph = chain()
    groups = [
        Supernode("in", ("embed 0",)),
        Supernode("mid", ((0, -1, 0), (1, 0, 1))),
        Supernode("out", ("target 0",)),
        Supernode("miss", ("error 0:0",)),
    ]
    small = supernode_graph(graph, groups)
    want = np.zeros((4, 4))
    want[1, 0] = 1.0  # the second feature has all its input from inside: f = 0
    want[2, 1] = 1.0
    assert (small.edge_GG == want).all()
    assert small.influence_G.tolist() == [1, 2, 1, 0]
    assert small.names == ("in", "mid", "out", "miss")


def test_bad_groups_are_refused() -> None:
    graph = chain()
    one = Supernode("one", ((0, 0, 0), "embed 0"))
    with pytest.raises(InputError, match=r"L0 feature 0@0 is in .*'one' and 'two'"):
        supernode_graph(graph, [one, Supernode("two", ("0:0:0",))])
    with pytest.raises(InputError, match="two supernodes are called 'one'"):
        supernode_graph(graph, [one, Supernode("one", ("target 0",))])
    with pytest.raises(InputError, match="no members"):
        supernode_graph(graph, [Supernode("none", ())])
    with pytest.raises(InputError, match=r"no node .*not active there"):
        supernode_graph(graph, [Supernode("off", ((1, 0, 7),))])
    with pytest.raises(InputError, match="choose total or external"):
        supernode_graph(graph, [one], norm="other")  # pyright: ignore
    with pytest.raises(InputError, match="no features"):
        expand_edits(
            [jaxclt.Edit(supernode=Supernode("x", ("embed 0",)), scale=0)], n_tokens=1
        )


def test_a_group_is_what_a_patch_changes() -> None:
    """One notion: the features of a group are edited, its tokens have no activation."""
    group = Supernode("mid", ((0, 0, 0), "embed 0", (1, -1, 1)))
    edits = [jaxclt.Edit(supernode=group, scale=0)]
    found = expand_edits(edits, n_tokens=1)
    assert found == [[(0, 0, 0), (1, 0, 1)]]


def test_links_in_words() -> None:
    groups = [
        Supernode("in\n", ("embed 0",)),
        Supernode("low", ((0, 0, 0),)),
        Supernode("high", ((1, 0, 1),)),
        Supernode("out", ("target 0",)),
    ]
    small = supernode_graph(chain(), groups)
    lines = describe_supernodes(small).splitlines()
    assert lines == [
        "100.00% +  in\\n -> low  (100% of its input)",
        "100.00% -  low -> high  (100% of its input)",
        "100.00% +  high -> out  (100% of its input)",
        "replacement 1.000, completeness 1.000, blur 0.000",
    ]
    assert len(describe_supernodes(small, k=1).splitlines()) == 2
    with pytest.raises(InputError, match="at least one link"):
        describe_supernodes(small, k=0)


def test_strongest_links_come_first() -> None:
    graph = random_graph(4)
    small = supernode_graph(graph, groups_of(graph, random_labels(graph, 4, 8)))
    percent = [float(line[:6]) for line in describe_supernodes(small).splitlines()[:-1]]
    assert percent == sorted(percent, reverse=True)
    assert len(percent) > 5


# -- suggestions -----------------------------------------------------------------------


def twins() -> Graph:
    """Two tokens, each read by three twins of which one acts against the others."""
    graph = random_graph(
        0, counts=(6,), n_tokens=2, n_targets=1, bias=False, rest=False
    )
    edge_RN = np.zeros_like(graph.edge_RN)
    first = graph.embed_cols.start
    for a in range(6):
        edge_RN[a, first + a // 3] = 1.0 + a % 2
        edge_RN[6, a] = (1 + a) * (-1 if a % 3 == 2 else 1)
    pos_A = np.repeat([0, 1], 3).astype(np.int32)
    return solved(dataclasses.replace(graph, edge_RN=edge_RN, pos_A=pos_A))


def features(groups: list[Supernode]) -> list[list[int]]:
    return sorted(sorted(f for _, _, f in g.features) for g in groups if g.features)


def test_twins_are_grouped() -> None:
    groups = suggest_supernodes(twins())
    assert features(groups) == [[0, 1], [2], [3, 4], [5]]
    assert [g.name for g in groups][:2] == ["L0 feature 4@1 +1", "L0 feature 5@1"]
    assert [g.nodes for g in groups[4:]] == [("embed 0",), ("embed 1",), ("target 0",)]
    small = supernode_graph(twins(), groups)
    assert small.blur == near(0, abs=1e-12)
    assert small.replacement == near(1)


def test_what_may_share_a_group() -> None:
    """The sign and the position each keep nodes apart; a cut of 2 merges the rest."""
    loose = {"distance": 2.0, "same_position": False}
    assert features(suggest_supernodes(twins(), distance=2.0)) == [
        [0, 1], [2], [3, 4], [5],
    ]  # fmt: skip
    assert features(suggest_supernodes(twins(), distance=2.0, same_sign=False)) == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert features(suggest_supernodes(twins(), **loose)) == [[0, 1, 3, 4], [2, 5]]  # pyright: ignore
    every = suggest_supernodes(twins(), same_sign=False, **loose)  # pyright: ignore
    assert features(every) == [[0, 1, 2, 3, 4, 5]]
    assert features(suggest_supernodes(twins(), distance=0.0)) == [
        [0, 1], [2], [3, 4], [5],
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3])
def test_the_blur_asked_for_is_kept(limit: float) -> None:
    graph = random_graph(6, counts=(8, 8, 8), n_tokens=2)
    groups = suggest_supernodes(graph, blur=limit)
    small: SupernodeGraph = supernode_graph(graph, groups)
    assert small.blur <= limit + 1e-12
    # Every kept feature is in exactly one group; the scores are those of all of them.
    assert sum(len(g.features) for g in groups) == graph.n_features
    assert small.replacement == near(scores(graph).replacement, rel=1e-12)
    if limit:
        finest = suggest_supernodes(graph, blur=0.0)
        assert len(groups) < len(finest)


def test_only_kept_features_are_grouped() -> None:
    graph = case_graph("clt")
    groups = suggest_supernodes(graph)
    kept = graph.pruning.keep_N[graph.feature_cols]
    assert sum(len(g.features) for g in groups) == kept.sum() < len(kept)
    small = supernode_graph(graph, groups)
    assert small.blur <= 0.1
    assert small.replacement <= scores(graph).replacement


def test_profiles_are_total_effects() -> None:
    """What clusters: effects of tokens on features, by the inverse (maths 9.3)."""
    graph = random_graph(5, counts=(5, 5, 5), bias=False, rest=False)
    A = graph.n_features
    unit_AA = graph.edge_RN[:A, :A] / graph.value_A
    input_AT = np.linalg.inv(np.eye(A) - unit_AA) @ graph.edge_RN[:A, graph.embed_cols]
    np.testing.assert_allclose(input_by_token(graph), input_AT, atol=1e-12)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"distance=3: give a number in 0\.\.2"):
        suggest_supernodes(twins(), distance=3)
    with pytest.raises(InputError, match="blur=-1"):
        suggest_supernodes(twins(), blur=-1)
