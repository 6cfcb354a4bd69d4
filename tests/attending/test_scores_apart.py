"""Attention scores taken apart, against all pairs of nodes by plain numpy."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    FAMILIES,
    FAMILY_CASES,
    case,
    case_active,
    case_graph,
    close,
    recorded,
)
from oracle import Frozen

from jaxclt.attending import apart as apart_module
from jaxclt.attending.apart import Apart, take_apart, take_one_apart
from jaxclt.attending.brought import Nodes, make_nodes
from jaxclt.attending.cells import Cell
from jaxclt.attending.pairs import strongest_pairs
from jaxclt.clt.active import Active, active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.graph import Graph
from jaxclt.graph.prompt import Recorded
from jaxclt.lm.run import record
from jaxclt.testing import Tiny, tiny

pytestmark = pytest.mark.usefixtures("x64")

# The families have all switches of attention; dictionaries are in the tests below.
SOME = [pytest.param(name, marks=pytest.mark.slow) for name in CASES]
SUMS = ("query_N", "key_N", "query_against_N", "key_against_N")
CHANNELS = ("query_UC", "key_UC", "mean_key_UC")


def cell(layer: int, head: int, query: int, key: int) -> Cell:
    return Cell(layer, head, query, key, 0.0, 0.0, 0.0, 0.0)


def cells(t: Tiny) -> list[Cell]:
    """One of each layer, of different heads, and two more of the last row."""
    last, H = len(t.token_T) - 1, t.cfg.n_heads
    every = [cell(l, l % H, last - l % 2, last - 1 - l % 2) for l in range(4)]
    return [*every, cell(2, 1, last, last), cell(2, 2, last, last - 1)]


class Brute:
    """All pairs of one cell."""

    def __init__(self, model: Frozen, graph: Graph) -> None:
        self.model, self.source_NLTD = model, model.sources(graph)
        self.N = graph.edge_RN.shape[1]

    def sides(self, at: Cell) -> tuple[np.ndarray, np.ndarray]:
        """Queries [N + 2, C] at the cell's query, keys [N + 2, S, C] up to it."""
        source_NTD = self.source_NLTD[:, at.layer]
        query, key = self.model.heads(at.layer, source_NTD, biases=False)
        bias_TD = source_NTD[self.N]
        query[self.N], key[self.N] = self.model.heads(at.layer, bias_TD, biases=True)
        return query[:, at.query, at.head], key[:, : at.query + 1, at.head]

    def pairs(self, at: Cell) -> np.ndarray:
        """[N + 2, S, N + 2]: the pairs of every key of the row."""
        query_NC, key_NSC = self.sides(at)
        return self.model.scale * np.einsum("nc,msc->nsm", query_NC, key_NSC)


def check(brute: Brute, found: Apart) -> None:
    """Pairs, sums, competition, and the score itself."""
    at, model = found.cell, brute.model
    query_NC, key_NSC = brute.sides(at)
    row_S = model.patterns[at.layer][at.head, at.query, : at.query + 1]
    mean_NC = np.einsum("s,nsc->nc", row_S, key_NSC)
    U = found.node_U
    for got, want in zip(
        (getattr(found, name) for name in CHANNELS),
        (query_NC[U], key_NSC[U, at.key], mean_NC[U]),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    pair_NSN = brute.pairs(at)
    pair_NN = pair_NSN[:, at.key]
    against_NN = pair_NN - np.einsum("s,nsm->nm", row_S, pair_NSN)
    sums = pair_NN.sum(1), pair_NN.sum(0), against_NN.sum(1), against_NN.sum(0)
    for name, want in zip(SUMS, sums, strict=True):
        np.testing.assert_allclose(getattr(found, name), want, rtol=0, atol=1e-12)
    score_S = model.scores(at.layer)[at.head, at.query, : at.query + 1]
    np.testing.assert_allclose(found.asked.score_S, score_S, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.asked.pattern_S, row_S, rtol=0, atol=1e-13)
    assert pair_NN.sum() == pytest.approx(found.asked.score, abs=1e-12)
    beyond = score_S[at.key] - row_S @ score_S
    assert against_NN.sum() == pytest.approx(beyond, abs=1e-12)
    assert found.asked.beyond == pytest.approx(against_NN.sum(), abs=1e-12)
    assert max(found.relative_error, found.competition_error) < 1e-12
    # Weighted by the pattern, competition of one pair sums to nothing over the row.
    mean_NN = np.einsum("s,nsm->nm", row_S, pair_NSN)
    rest = np.einsum("s,nsm->nm", row_S, pair_NSN - mean_NN[:, None])
    np.testing.assert_allclose(rest, 0, atol=1e-13)
    check_places(found, model, pair_NN, against_NN)
    listed = found.pairs(30)
    for pair in listed:
        assert pair.score == pytest.approx(pair_NN[pair[:2]], abs=1e-12)
        assert pair.competition == pytest.approx(against_NN[pair[:2]], abs=1e-12)
    sizes = [abs(pair.competition) for pair in listed]
    assert sizes == sorted(sizes, reverse=True)
    want = np.sort(np.abs(against_NN[np.ix_(U, U)]), axis=None)[::-1][: len(sizes)]
    np.testing.assert_allclose(sizes, want, rtol=0, atol=1e-12)


def check_places(
    found: Apart, model: Frozen, pair_NN: np.ndarray, against_NN: np.ndarray
) -> None:
    """Pairs summed by the positions of their nodes."""
    a, (L, T, _) = model.active, model.t.recording.resid_LTD.shape
    listed = found.places(999)
    assert sum(x.score for x in listed) == pytest.approx(pair_NN.sum(), abs=1e-11)
    if len(pair_NN) != len(a.layer_A) + L * T + T + 2:
        return  # features that are no columns stand at several positions
    pos_N = np.r_[a.pos_A, np.tile(np.arange(T), L), np.arange(T), T, T]
    for name, x_NN in (("score", pair_NN), ("competition", against_NN)):
        want_PP = np.zeros((T + 1, T + 1))
        np.add.at(want_PP, (pos_N[:, None], pos_N), x_NN)
        for pair in listed[:12]:
            want = want_PP[pair.query, pair.key]
            assert getattr(pair, name) == pytest.approx(want, abs=1e-11)


def compare(t: Tiny, active: Active, graph: Graph, p: Recorded | None = None) -> Nodes:
    """Several cells at once, and one for all nodes, with the brute force."""
    brute = Brute(Frozen(t, active), graph)
    nodes = make_nodes(p or recorded(t, active), graph, at_once=24)
    chosen = cells(t)
    for found, at in zip(take_apart(nodes, chosen), chosen, strict=True):
        assert found.cell == at
        check(brute, found)
    every = take_one_apart(nodes, chosen[1])
    check(brute, every)
    assert len(every.node_U) == graph.edge_RN.shape[1] + 2
    return nodes


@pytest.mark.parametrize("name", [*SOME, *FAMILIES])
def test_pairs_of_every_family(name: str) -> None:
    """Maths 22.22 to 22.24: rotary, norms of heads, biases, groups, windows, caps."""
    compare(case(name), case_active(name), case_graph(name))


GEMMA3 = pytest.param("gemma3", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["span2", GEMMA3])
def test_what_is_no_node_is_in_the_rest(name: str) -> None:
    """A graph of few features: the others bring their part all the same."""
    t, active = case(name), case_active(name)
    graph = t.graph(AttributeConfig(max_features=9, tolerance=0.0, devices=1))
    assert graph.n_features == 9
    nodes = compare(t, active, graph)
    N = graph.edge_RN.shape[1]
    found = take_one_apart(nodes, cells(t)[3])
    assert np.abs(found.query_UC[N + 1]).max() > 1e-3


def test_neurons() -> None:
    t = case("neox")
    active = active_features(NeuronDictionary(5), t.params, t.recording, t.cfg)
    compare(t, active, t.graph(active=active))


def test_padded_equals_unpadded() -> None:
    """A recording with padding after the prompt, whose patterns are not kept."""
    t, active, graph = case("gemma3"), case_active("gemma3"), case_graph("gemma3")
    token_T = jnp.concatenate([t.token_T, jnp.asarray([4, 1], jnp.int32)])
    longer = jax.jit(
        lambda params, token_T: record(params, token_T, cfg=t.cfg, keep_patterns=False)
    )(t.params, token_T)
    found = active_features(t.dictionary, t.params, longer, t.cfg, len(t.token_T))
    p = Recorded(t.params, longer, found, cfg=t.cfg, n_tokens=len(t.token_T))
    compare(t, active, graph, p)


def test_chosen_nodes_hold_the_strongest_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of few chosen nodes most of the ten strongest pairs of all are among theirs."""
    t, active, graph = case("clt"), case_active("clt"), case_graph("clt")
    nodes = make_nodes(recorded(t, active), graph)
    monkeypatch.setattr(apart_module, "_CHOSEN", 20)
    hits = []
    for at in cells(t):
        (few,) = take_apart(nodes, [at])
        assert len(few.node_U) <= 42
        every = take_one_apart(nodes, at)
        best = {pair[:2] for pair in every.pairs(10)}
        hits.append(len(best & {pair[:2] for pair in few.pairs(10)}) / 10)
    assert np.mean(hits) > 0.8


@pytest.mark.slow  # `.ci/run` asks the same of a real model
@pytest.mark.parametrize("name", ["clt", "gemma3"])
def test_sums_are_close_in_float32(name: str) -> None:
    t = case(name)
    with jax.enable_x64(False):
        half = tiny(dtype=jnp.float32, **(CASES | FAMILY_CASES)[name])
        graph = half.graph()
        nodes = make_nodes(recorded(half, half.active), graph)
        found = take_apart(nodes, cells(t))
    assert max(x.relative_error for x in found) < 1e-5
    assert max(x.competition_error for x in found) < 1e-5


def test_strongest_pairs_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the whole matrix, however it is cut."""
    key_q, key_k = jax.random.split(jax.random.key(3))
    size_N = np.exp(-np.arange(50) / 6.0)[:, None]
    query_NC = np.asarray(jax.random.normal(key_q, (50, 3))) * size_N
    key_NC = np.asarray(jax.random.normal(key_k, (50, 3))) * size_N[::-1]
    query_NC[7] = key_NC[40] = 0
    size_NN = np.abs(query_NC @ key_NC.T)
    for block, n in itertools.product((4, 16, 512), (1, 25, 9999)):
        monkeypatch.setattr("jaxclt.attending.pairs._BLOCK", block)
        i, j = strongest_pairs(query_NC, key_NC, n)
        want = np.sort(size_NN[size_NN > 0])[::-1][:n]
        close(size_NN[i, j], want)
        assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i)


def test_no_cells_are_no_work() -> None:
    t = case("clt")
    nodes = make_nodes(recorded(t, case_active("clt")), case_graph("clt"))
    nothing = dataclasses.replace(nodes, puller=None)  # pyright: ignore
    assert take_apart(nothing, []) == []
