"""Signs where activations are below zero: against ablations, and by turning round.

A neuron that reads and writes the opposite is the same neuron, but its activation, and
what its inputs do to it, have the other sign. Nothing that a graph says about what
strengthens what may depend on it.
"""

from __future__ import annotations

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, close, random_graph, solved

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.explain import edge_parts
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import find_row, node_name
from jaxclt.graph.paths import Path, describe_paths, strongest_paths
from jaxclt.graph.supernodes import (
    describe_supernodes,
    suggest_supernodes,
    supernode_graph,
)
from jaxclt.lm import layers
from jaxclt.lm.run import Policy, run
from jaxclt.types import Supernode
from jaxclt.validation.predictions import group_effects, pairwise_influence

pytestmark = pytest.mark.usefixtures("x64")

ALL = 100_000


def turned(graph: Graph, seed: int, share: float = 0.5) -> Graph:
    """The same graph, some features of which read and write the opposite."""
    rng = random.Random(seed)
    A, K = graph.n_features, graph.n_targets
    side_A = np.array([-1.0 if rng.random() < share else 1.0 for _ in range(A)])
    side_R = np.r_[side_A, np.ones(K)]
    return dataclasses.replace(
        graph,
        value_A=graph.value_A * side_A,
        preact_A=graph.preact_A * side_A,
        edge_RN=graph.edge_RN * side_R[:, None],
        bias_R=graph.bias_R * side_R,
        rest_R=graph.rest_R * side_R,
        readout_R=graph.readout_R * side_R,
    )


# -- against ablations -----------------------------------------------------------------


def all_paths(graph: Graph, start: int, end: int) -> dict[tuple[int, ...], float]:
    """Products of edges over the pre-activations passed, path by path."""
    A, N = graph.n_features, graph.edge_RN.shape[1]
    found = {}
    waiting = [((start,), 1.0)]
    while waiting:
        nodes, product = waiting.pop()
        at = nodes[-1]
        if at != start:
            product = product / float(graph.preact_A[at])
        edge = float(graph.edge_RN[end, at])
        if edge:
            found[*nodes, end - A + N] = product * edge
        for row in range(at + 1, A):
            edge = float(graph.edge_RN[row, at])
            if edge:
                waiting.append(((*nodes, row), product * edge))
    return found


@pytest.fixture(scope="module")
def neurons() -> Graph:
    with jax.enable_x64(True):
        t = case("clt")
        active = active_features(NeuronDictionary(3), t.params, t.recording, t.cfg)
        return t.graph(active=active)


def ablated(neurons: Graph) -> np.ndarray:
    """What the targets lose when each neuron is taken out, [K, A]: the model is run.

    Patterns, norms and gates as they were; neurons that are nodes answer, the others
    write what they wrote.
    """
    t = case("clt")
    shape = (t.cfg.n_layers, neurons.n_tokens, t.cfg.d_mlp)
    place = neurons.layer_A, neurons.pos_A, neurons.feature_A
    node_LTI = np.zeros(shape, bool)
    node_LTI[place] = True
    normed = jax.vmap(layers.normalise)(
        t.recording.mid_LTD,
        t.recording.frozen.mlp_scale_LT,
        layers.mlp_norm(t.params.blocks),
    )
    gate_LTI, up_LTI = jax.vmap(lambda p, x: layers.gate_and_up(p, x, cfg=t.cfg))(
        t.params.blocks, normed
    )

    @jax.jit
    @jax.vmap
    def targets(factor_LTI: jax.Array) -> jax.Array:
        def write(carry, mid_TD, scale_T, p, x):
            gate_TI, clean_TI, node_TI, write_TD, factor_TI = x
            normed_TD = layers.normalise(mid_TD, scale_T, layers.mlp_norm(p))
            _, up_TI = layers.gate_and_up(p, normed_TD, cfg=t.cfg)
            now_TI = jnp.where(node_TI, gate_TI * up_TI * factor_TI, clean_TI)
            return carry, write_TD + (now_TI - clean_TI) @ p.down_LID

        clean_LTI, write_LTD = gate_LTI * up_LTI, t.recording.write_LTD
        per_layer = (gate_LTI, clean_LTI, node_LTI, write_LTD, factor_LTI)
        done = run(
            t.params,
            t.recording.embed_TD,
            Policy(write, per_layer=per_layer),
            cfg=t.cfg,
            frozen=t.recording.frozen,
        )
        return t.targets.vec_KD @ done.out_TD[-1]

    factor_XLTI = np.ones((neurons.n_features + 1, *shape))
    factor_XLTI[(np.arange(neurons.n_features), *place)] = 0
    value_XK = np.asarray(targets(factor_XLTI))
    return (value_XK[-1] - value_XK[:-1]).T


def test_paths_through_neurons_sum_to_what_an_ablation_takes(neurons: Graph) -> None:
    """By brute force, and what `strongest_paths` finds is these paths, sign by sign."""
    A, K = neurons.n_features, neurons.n_targets
    assert 0.3 < (neurons.preact_A < 0).mean() < 0.7
    want_KA = ablated(neurons)
    close(solve_total_effect(neurons), want_KA, 1e-12)
    n_paths = n_negative = 0
    for s in range(0, A, 5):
        for k in range(0, K, 4):
            every = all_paths(neurons, s, A + k)
            scale = sum(map(abs, every.values()), 1e-30)
            assert abs(sum(every.values()) - want_KA[k, s]) < 1e-12 * scale
            k_best = len(every) if len(every) < 500 else 50
            for share in (True, False):
                paths = strongest_paths(
                    neurons, start=s, end=A + k, k=max(k_best, 1), share=share
                )
                assert len(paths) == k_best
                for path in paths:
                    value = every[path.nodes]
                    assert path.sign == np.sign(value)
                    if not share:
                        assert path.strength == pytest.approx(abs(value), rel=1e-11)
                    n_negative += value < 0
            n_paths += len(every)
    assert n_paths > 500
    assert n_negative > 100


def test_paths_from_tokens_too(neurons: Graph) -> None:
    """Those that are printed: of all, the strongest, ranked either way."""
    A, N = neurons.n_features, neurons.edge_RN.shape[1]
    for share in (True, False):
        paths = strongest_paths(neurons, k=200, share=share)
        assert len(paths) == 200
        for path in paths:
            value = 1.0
            for a, b in zip(path.nodes, path.nodes[1:], strict=False):
                value *= neurons.edge_RN[b if b < A else b - N + A, a]
            for node in path.nodes[1:-1]:
                value /= neurons.preact_A[node]
            assert path.sign == np.sign(value)
            if not share:
                value *= neurons.target_prob_K[path.nodes[-1] - N]
                assert path.strength == pytest.approx(abs(value), rel=1e-11)


# -- by turning round ------------------------------------------------------------------


def same_paths(a: list[Path], b: list[Path], sign: int = 1) -> None:
    assert [(p.nodes, p.sign) for p in a] == [(p.nodes, sign * p.sign) for p in b]
    close([p.strength for p in a], np.array([p.strength for p in b]), 1e-13)


@pytest.mark.parametrize("seed", range(2))
def test_turning_features_round_changes_no_path(seed: int) -> None:
    graph = random_graph(seed)
    other = turned(graph, seed)
    assert (other.value_A < 0).any()
    for share in (True, False):
        same_paths(
            strongest_paths(graph, k=ALL, share=share),
            strongest_paths(other, k=ALL, share=share),
        )
        # To a feature that was turned round, itself the effect is the opposite.
        for end in range(graph.n_features):
            same_paths(
                strongest_paths(graph, end=end, k=ALL, share=share),
                strongest_paths(other, end=end, k=ALL, share=share),
                sign=int(other.side_R[end]),
            )


@pytest.mark.parametrize("seed", range(4))
def test_turning_features_round_changes_no_supernode(seed: int) -> None:
    graph = random_graph(seed, counts=(6, 6, 6), n_tokens=2)
    other = turned(graph, seed + 10)
    groups = suggest_supernodes(graph)
    assert suggest_supernodes(other) == groups
    assert max(len(group.features) for group in groups) > 1
    for norm in ("total", "external"):
        one, two = (supernode_graph(g, groups, norm=norm) for g in (graph, other))
        close(two.edge_GG, one.edge_GG, 1e-13)
        close(two.size_GG, one.size_GG, 1e-13)
        assert describe_supernodes(two) == describe_supernodes(one)


def test_turning_features_round_changes_no_prediction() -> None:
    graph = random_graph(7, counts=(6, 6, 6))
    other = turned(graph, 7)
    close(solve_total_effect(other), solve_total_effect(graph), 1e-12)
    groups = [np.array([0, 3, 8]), np.array([2, 14])]
    close(group_effects(other, groups), group_effects(graph, groups), 1e-12)
    watch = np.array([5, 17])
    close(pairwise_influence(other, watch), pairwise_influence(graph, watch), 1e-13)


def chain(first: float, second: float) -> Graph:
    """token 0 -> feature 0 -> feature 1 -> target, as the case's first path is."""
    graph = random_graph(
        0, counts=(1, 1), n_tokens=1, n_targets=1, bias=False, rest=False
    )
    edge_RN = np.zeros_like(graph.edge_RN)
    edge_RN[0, graph.embed_cols.start] = first
    edge_RN[1, 0], edge_RN[2, 1] = second, 0.27
    value_A = np.array([first, second])
    return solved(
        dataclasses.replace(graph, edge_RN=edge_RN, value_A=value_A, preact_A=value_A)
    )


@pytest.mark.parametrize("first", [6.149, -6.149])
@pytest.mark.parametrize("second", [2.0, -2.0])
def test_words(first: float, second: float) -> None:
    """One input alone makes a feature what it is: it strengthens it on either side."""
    graph = chain(first, second)
    (path,) = strongest_paths(graph, share=False)
    assert path.sign * path.strength == pytest.approx(0.95 * 0.27)
    assert describe_paths(graph, [path]).split()[1] == "+"
    groups = [
        Supernode("in", ("embed 0",)),
        Supernode("low", ((0, 0, 0),)),
        Supernode("high", ((1, 0, 1),)),
        Supernode("out", ("target 0",)),
    ]
    lines = describe_supernodes(supernode_graph(graph, groups)).splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["+"] * 3
    text = edge_parts(graph, "0:0:0", "1:0:1").text()
    assert ("below zero: the edge strengthens it" in text) == (second < 0)
    weaker = dataclasses.replace(graph, edge_RN=-graph.edge_RN)
    text = edge_parts(weaker, "0:0:0", "1:0:1").text()
    assert ("below zero: the edge weakens it" in text) == (second < 0)
    assert "below zero" not in edge_parts(graph, "1:0:1", "target 0").text()
    assert find_row(graph, node_name(graph, 1)) == 1
