"""The k strongest paths against all paths, written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from cases import close, random_graph, share_matrix

from jaxclt.errors import InputError
from jaxclt.graph import paths
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import node_name
from jaxclt.graph.paths import Path, describe_paths, strongest_paths
from jaxclt.graph.prune import prune

pytestmark = pytest.mark.usefixtures("x64")

ALL = 10_000  # more paths than the random graphs have


def walks(
    step: np.ndarray, nodes: tuple[int, ...], sources: set[int], size: float
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every path from a source to the first of `nodes`, by recursion."""
    for s in np.flatnonzero(step[nodes[0]]):
        longer, reach = (int(s), *nodes), size * step[nodes[0], s]
        if s in sources:
            yield longer, reach
        yield from walks(step, longer, sources, reach)


def signed_shares(graph: Graph, edge_RN: np.ndarray | None = None) -> np.ndarray:
    """Shares with the sign of their edges, over columns and targets."""
    N, A = graph.edge_RN.shape[1], graph.n_features
    share = share_matrix(graph, edge_RN)[: N + graph.n_targets, : N + graph.n_targets]
    share[:A, :N] *= np.sign(graph.edge_RN[:A])
    share[N:, :N] *= np.sign(graph.edge_RN[A:])
    return share


def every_path(
    graph: Graph,
    step: np.ndarray,
    start: int | None = None,
    end: int | None = None,
) -> dict[tuple[int, ...], float]:
    N, A = graph.edge_RN.shape[1], graph.n_features
    embeddings = range(graph.embed_cols.start, graph.embed_cols.stop)
    sources = set(embeddings) if start is None else {start}
    if end is None:
        ends = {(N + k,): float(p) for k, p in enumerate(graph.target_prob_K)}
    else:
        ends = {(end if end < A else end - A + N,): 1.0}
    return {
        nodes: size
        for node, weight in ends.items()
        for nodes, size in walks(step, node, sources, weight)
    }


def assert_best(paths: list[Path], every: dict[tuple[int, ...], float], k: int) -> None:
    """The k best of all, in order, with the right strengths and signs."""
    want = sorted(every.items(), key=lambda item: -abs(item[1]))[:k]
    assert len(paths) == len(want)
    close([p.strength for p in paths], np.array([abs(s) for _, s in want]), 1e-13)
    assert len({p.nodes for p in paths}) == len(paths)
    for path in paths:
        assert path.strength * path.sign == pytest.approx(every[path.nodes], rel=1e-12)
        assert path.steps == len(path.nodes) - 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 3, 25, ALL])
def test_the_k_best_of_all_paths(seed: int, k: int) -> None:
    graph = random_graph(
        seed,
        zero_rows=0.2 * (seed % 2),
        convention="paper" if seed % 3 else "circuit-tracer",
    )
    every = every_path(graph, signed_shares(graph))
    assert 25 < len(every) < ALL
    assert_best(strongest_paths(graph, k=k), every, k)


@pytest.mark.parametrize("k", [2, ALL])
def test_from_any_column_to_any_row(k: int) -> None:
    """Features, errors and embeddings; nothing flows up."""
    graph = random_graph(11)
    step, found = signed_shares(graph), 0
    for start in range(graph.edge_RN.shape[1]):
        for end in range(len(graph.edge_RN)):
            paths = strongest_paths(graph, start=start, end=end, k=k)
            assert_best(paths, every_path(graph, step, start, end), k)
            found += len(paths)
    assert found > (200 if k == ALL else 100)


def test_all_paths_together_are_the_influence() -> None:
    graph = random_graph(12)
    N = graph.edge_RN.shape[1]
    for start in range(N):
        paths = strongest_paths(graph, start=start, k=ALL)
        assert all(p.steps <= graph.n_layers + 1 for p in paths)
        total = sum(p.strength for p in paths)
        assert total == pytest.approx(graph.influence_N[start], rel=1e-12, abs=1e-15)
    everything = sum(p.strength for p in strongest_paths(graph, k=ALL))
    want = graph.influence_N[graph.embed_cols].sum()
    assert everything == pytest.approx(want, rel=1e-12)


def test_only_what_pruning_keeps() -> None:
    """Shares stay those of the full rows."""
    graph = random_graph(13, counts=(5, 6, 4), density=0.9)
    pruning = prune(graph, node_threshold=0.8, edge_threshold=0.9)
    graph = dataclasses.replace(graph, pruning=pruning)
    step = signed_shares(graph, np.where(pruning.keep_edge_RN, graph.edge_RN, 0))
    every = every_path(graph, step)
    assert 5 < len(every) < len(every_path(graph, signed_shares(graph)))
    assert_best(strongest_paths(graph, k=ALL, kept=True), every, ALL)
    assert all(pruning.keep_N[list(nodes[:-1])].all() for nodes in every)


def test_by_effect_the_paths_sum_to_the_total_effect() -> None:
    graph = random_graph(14)
    A, N, K = graph.n_features, graph.edge_RN.shape[1], graph.n_targets
    unit = graph.edge_RN[:, :A] / graph.value_A
    total_KA = unit[A:] @ np.linalg.inv(np.eye(A) - unit[:A]) * graph.value_A
    for s in range(A):
        for k in range(K):
            paths = strongest_paths(graph, start=s, end=A + k, k=ALL, share=False)
            total = sum(p.sign * p.strength for p in paths)
            assert total == pytest.approx(total_KA[k, s], rel=1e-11, abs=1e-14)
            assert not any(p.share for p in paths)
    # From the embeddings, ranked.
    step = np.zeros((N + K, N + K))
    step[:A, :N], step[N:, :N] = graph.edge_RN[:A], graph.edge_RN[A:]
    step[:A] /= graph.value_A[:, None]
    every = every_path(graph, step)
    assert_best(strongest_paths(graph, k=40, share=False), every, 40)


def test_every_prefix_of_a_larger_graph_is_best() -> None:
    graph = random_graph(16, counts=(40, 60, 50, 30), n_tokens=4)
    paths = strongest_paths(graph, k=300)
    assert {p.steps for p in paths} >= {1, 2}
    strength = np.array([p.strength for p in paths])
    assert (np.diff(strength) <= 0).all()
    assert strength.sum() < graph.influence_N[graph.embed_cols].sum()
    assert strongest_paths(graph, k=20) == paths[:20]


def test_text() -> None:
    graph = random_graph(15, counts=(1, 1), n_tokens=2, n_targets=1, density=1.0)
    meta = dataclasses.replace(
        graph.meta, tokens=(" Tower", '\n"\x9b'), target_tokens=(" Paris",)
    )
    pos_A = np.zeros(2, np.int32)
    graph = dataclasses.replace(graph, meta=meta, pos_A=pos_A)
    names = [node_name(graph, i) for i in range(graph.edge_RN.shape[1] + 1)]
    assert names == [
        "L0 feature 0@0",
        "L1 feature 1@0",
        "L0 error@0",
        "L0 error@1",
        "L1 error@0",
        "L1 error@1",
        'token " Tower"@0',
        'token "\\n\\"\\u009b"@1',
        'output " Paris"',
    ]
    path = Path(nodes=(6, 1, 8), strength=0.1234, sign=-1)
    absolute = dataclasses.replace(path, sign=1, share=False)
    chain = 'token " Tower"@0 -> L1 feature 1@0 -> output " Paris"'
    layer, feature = graph.layer_A[0], graph.feature_A[0]
    named = dataclasses.replace(graph.meta, labels={f"{layer}:{feature}": 'a "b"\x1b'})
    labelled = describe_paths(
        dataclasses.replace(graph, meta=named),
        [dataclasses.replace(path, nodes=(0, graph.embed_cols.stop))],
    )
    assert f"feature {feature}@{graph.pos_A[0]} [" in labelled
    assert labelled.isprintable()
    text = describe_paths(graph, [path, absolute])
    assert text == f" 12.34% -  {chain}\n    0.123 +  {chain}"
    assert len(describe_paths(graph, strongest_paths(graph)).splitlines()) > 3


def test_bad_requests_are_refused() -> None:
    graph = random_graph(0)
    R, N = graph.edge_RN.shape
    for bad in ({"start": N}, {"start": -1}, {"end": R}, {"k": 0}):
        with pytest.raises(InputError):
            strongest_paths(graph, **bad)
    with pytest.raises(InputError):
        node_name(graph, N + graph.n_targets)


@pytest.mark.parametrize("kept", [False, True])
def test_rows_without_the_influence_for_it_need_no_search(
    monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Many features: the same paths as when every row is searched."""
    graph = random_graph(5, counts=(150, 150, 150), n_targets=3)
    graph = dataclasses.replace(graph, pruning=prune(graph, node_threshold=0.95))
    start = int(graph.embed_cols.start)
    assert graph.n_features > paths._FEW

    def searched() -> list[list[Path]]:
        return [
            strongest_paths(graph, k=7, kept=kept),
            strongest_paths(graph, k=300, kept=kept),
            strongest_paths(graph, k=3, start=start, kept=kept),
            strongest_paths(graph, k=3, start=5, kept=kept),
        ]

    quick = searched()
    monkeypatch.setattr(paths, "_FEW", 10**6)
    assert quick == searched()
    assert len(quick[1]) == 300
