"""A circuit put into a model by hand: the graph finds it and ablation confirms it.

Gates are constant, so the MLPs are linear and the graph's total effect is exact for the
model itself once patterns and norms are held. A neuron of layer 0 writes a direction
that a neuron of layer 2 reads, which writes towards one token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.targets import token_targets
from jaxclt.lm.run import record
from jaxclt.patching.change import Change
from jaxclt.patching.effects import Ask, Effect, measure_effect
from jaxclt.patching.features import gather_features
from jaxclt.patching.how import How
from jaxclt.patching.modes import patched
from jaxclt.patching.patchable import Patchable, make_patchable
from jaxclt.testing import tiny

pytestmark = pytest.mark.usefixtures("x64")

FIRST, SECOND, TOKEN = (0, 5, 3), (2, 5, 7), 11  # layer, position, neuron


@functools.cache
def planted() -> tuple[Graph, Patchable, Any]:
    with jax.enable_x64(True):
        t = tiny(7, dtype=jnp.float64)
        b = t.params.blocks
        L, D, I = b.up_LDI.shape
        way_D = np.asarray(jax.random.normal(jax.random.key(1), (D,), jnp.float64))
        up, down = np.zeros((L, D, I)), np.zeros((L, I, D))
        read_D = np.asarray(t.recording.mid_LTD[0, 5])
        up[0, :, 3] = read_D / np.linalg.norm(read_D)
        down[0, 3] = 3 * way_D
        up[2, :, 7] = way_D
        down[2, 7] = 0.4 * np.asarray(t.params.unembed_DV)[:, TOKEN]
        blocks = dataclasses.replace(
            b,
            gate_LDI=jnp.zeros_like(b.gate_LDI),
            gate_bias_LI=jnp.full((L, I), 2.0),
            up_LDI=jnp.asarray(up),
            up_bias_LI=jnp.zeros((L, I)),
            down_LID=jnp.asarray(down),
        )
        params = dataclasses.replace(t.params, blocks=blocks)
        rec = jax.jit(record, static_argnames="cfg")(params, t.token_T, cfg=t.cfg)
        dictionary = NeuronDictionary(8)
        targets = token_targets(params, rec.out_TD[-1], jnp.asarray([TOKEN, 4]))
        graph = attribute_recording(
            Prompt(
                params,
                rec,
                active_features(dictionary, params, rec, t.cfg),
                targets,
                cfg=t.cfg,
                config=AttributeConfig(max_features=None, tolerance=0.0),
            ),
            t.meta,
        )
        return graph, make_patchable(dictionary, params, rec, t.cfg), dictionary


def slot(place: tuple[int, int, int]) -> int:
    graph = planted()[0]
    own = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    return int(np.flatnonzero((own == place).all(1))[0])


def ablated(norm: bool, factor: float = 0.0) -> Effect:
    graph, model, dictionary = planted()
    change = Change.of(gather_features(dictionary, model, [FIRST]), factor)
    watch = gather_features(dictionary, model, [SECOND])
    ask = Ask(jnp.asarray(graph.target_token_K), jnp.asarray(5, jnp.int32), watch)

    @jax.jit
    def go(change: Change) -> Effect:
        range_2 = jnp.asarray([0, 0], jnp.int32)
        done = patched(model, change, range_2, how=How(freeze_norm=norm))
        return measure_effect(model, done, ask)

    return go(change)


def test_the_graph_shows_the_planted_path():
    graph = planted()[0]
    a, b = slot(FIRST), slot(SECOND)
    assert np.argmax(np.abs(graph.edge_RN[b, : graph.n_features])) == a
    through = graph.edge_RN[b, a] * graph.edge_RN[graph.n_features, b]
    through = through / graph.value_A[b]
    total = solve_total_effect(graph)[0, a]
    assert abs(through) > 0.3 * abs(total)


@pytest.mark.parametrize("factor", [0.0, -2.0, 4.0])
def test_ablating_it_does_what_the_graph_says(factor: float):
    graph, _, _ = planted()
    a, b = slot(FIRST), slot(SECOND)
    found = ablated(norm=True, factor=factor)
    clean_K = graph.readout_R[graph.target_rows]
    close(
        np.asarray(found.logit_K) - clean_K,
        (factor - 1) * solve_total_effect(graph)[:, a],
        1e-9,
    )
    assert found.watch_W is not None
    moved = float(found.watch_W[0]) - graph.value_A[b]
    assert moved == pytest.approx((factor - 1) * graph.edge_RN[b, a], abs=1e-9)


def test_with_live_norms_the_answer_keeps_its_sign():
    graph, _, _ = planted()
    predicted = -solve_total_effect(graph)[0, slot(FIRST)]
    measured = float(ablated(norm=False).logit_K[0]) - graph.readout_R[graph.n_features]
    assert abs(predicted) > 0.1
    assert np.sign(measured) == np.sign(predicted)
    assert abs(measured - predicted) > 1e-6
