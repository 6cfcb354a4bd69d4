"""Total effects of attention cells against a numpy model that is changed and run."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FAMILIES, case, case_active, case_graph, case_recorded
from oracle import Frozen

from jaxclt.attending.cells import HeadEffects, head_effects, moved_cotangents, one_cell
from jaxclt.attending.clean import make_clean
from jaxclt.clt.active import Active, active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph.contrast import contrast
from jaxclt.graph.graph import Graph
from jaxclt.graph.prompt import Prompt, Recorded
from jaxclt.graph.targets import functional_targets, token_targets
from jaxclt.testing import Tiny

pytestmark = pytest.mark.usefixtures("x64")

SOME = [
    name if name == "clt" else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
]


def asked(t: Tiny, active: Active) -> Prompt:
    """A case's prompt with its targets."""
    return Prompt(t.params, t.recording, active, t.targets, cfg=t.cfg)


def effects(t: Tiny, active: Active, graph: Graph, n: int = 600) -> HeadEffects:
    p = asked(t, active)
    return head_effects(p, graph, p.target_rows(), n=n)


def check(t: Tiny, active: Active, graph: Graph) -> None:
    """Every cell: without what it moves, and with a little more of its score."""
    found, model = effects(t, active, graph), Frozen(t, active)
    weight_K, patterns = contrast(graph).weight_K, model.patterns
    clean, L, H = model.answer(patterns, weight_K), t.cfg.n_layers, t.cfg.n_heads
    listed = {tuple(cell[:4]) for cell in found.cells}
    every = {tuple(at) for at in np.argwhere(patterns > 0).tolist()}
    assert listed <= every
    step = 1e-5
    for at in sorted(every - listed)[:8]:  # they move nothing that the answer reads
        without = patterns.copy()
        without[at] = 0
        assert model.answer(without, weight_K) == pytest.approx(clean, abs=1e-12)
    for cell in found.cells[:: max(1, len(found.cells) // 24)]:
        at = cell.head, cell.query, cell.key
        without = patterns.copy()
        without[cell.layer][at] = 0
        effect = clean - model.answer(without, weight_K)
        assert cell.effect == pytest.approx(effect, rel=1e-9, abs=1e-12)
        score_HTS = model.scores(cell.layer)
        assert cell.score == pytest.approx(score_HTS[at], rel=1e-11, abs=1e-13)
        ends = []
        for sign in (1, -1):
            moved = score_HTS.copy()
            moved[at] += sign * step
            other = patterns.copy()
            other[cell.layer] = model.pattern(cell.layer, moved)
            ends.append(model.answer(other, weight_K))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert cell.pattern_effect == pytest.approx(slope, rel=1e-6, abs=1e-9)
    sizes = np.abs([cell.effect for cell in found.cells])
    assert (np.diff(sizes) <= 0).all()
    total_LH = np.zeros((L, H))
    for cell in found.cells:
        total_LH[cell.layer, cell.head] += cell.effect
    np.testing.assert_allclose(found.effect_LH, total_LH, rtol=0, atol=1e-12)
    for layer in range(L):  # a head at a time: all that it moves
        for head in range(H):
            without = patterns.copy()
            without[layer, head] = 0
            effect = clean - model.answer(without, weight_K)
            assert total_LH[layer, head] == pytest.approx(effect, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [*SOME, *FAMILIES])
def test_effects_of_cells_and_heads(name: str) -> None:
    """Maths 22.20, 22.21."""
    model = Frozen(case(name), case_active(name))
    for layer, pattern_HTS in enumerate(model.patterns):
        ours = model.pattern(layer, model.scores(layer))
        np.testing.assert_allclose(ours, pattern_HTS, rtol=0, atol=1e-13)
    check(case(name), case_active(name), case_graph(name))


@pytest.mark.parametrize(
    "name", ["clt", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_with_the_models_neurons(name: str) -> None:
    t = case(name)
    active = active_features(NeuronDictionary(5), t.params, t.recording, t.cfg)
    check(t, active, t.graph(active=active))


def test_a_target_inside_the_model() -> None:
    """What reads an MLP's output, and the stream, at other positions."""
    t = case("skip")
    vec_D = np.cos(np.arange(t.cfg.d_model))
    inside = [
        functional_targets(t.params, t.recording, site, 3, vec_D, cfg=t.cfg)
        for site in ("mlp_out:2", "resid_mid:3")
    ]
    for target in inside:
        other = dataclasses.replace(t, targets=target)
        check(other, t.active, other.graph())


def test_two_tokens_are_compared_where_they_are_at_one_place() -> None:
    t = case("clt")
    tokens = token_targets(t.params, t.recording.out_TD[-1], jnp.asarray([3, 5, 8]))
    elsewhere = dataclasses.replace(tokens, pos_K=np.array([5, 2, 5], np.int32))
    for targets, want in ((tokens, [1, -1, 0]), (elsewhere, [1, 0, 0])):
        other = dataclasses.replace(t, targets=targets)
        assert contrast(other.graph()).weight_K.tolist() == want


def test_one_cell_by_its_place_and_in_words() -> None:
    graph, p = case_graph("clt"), asked(case("clt"), case_active("clt"))
    found = effects(case("clt"), case_active("clt"), graph, n=30)
    moved_LTD = moved_cotangents(p, graph, p.target_rows())
    for cell in found.cells[:5]:
        again = one_cell(make_clean(p), moved_LTD, *cell[:4])
        np.testing.assert_allclose(again, cell, rtol=1e-12)
    text = str(found)
    best = found.cells[0]
    assert f"L{best.layer}H{best.head} at " in text
    assert found.contrast in text


def test_features_that_are_no_nodes_hold_still() -> None:
    """The effect of a graph of few nodes is that of a model with only these live."""
    t, every = case("clt"), case_active("clt")
    few = np.zeros(len(every.layer_A), bool)
    few[::3] = True
    graph = t.graph(active=every.where(few))
    whole = effects(t, every, graph)
    alone = effects(t, every.where(few), graph)
    np.testing.assert_allclose(whole.effect_LH, alone.effect_LH, rtol=0, atol=1e-12)


def test_recorded_again_without_targets_is_enough() -> None:
    """Targets' reads are given apart, so that saved graphs need no targets."""
    p: Recorded = case_recorded("clt")
    rows = asked(case("clt"), case_active("clt")).target_rows()
    found = head_effects(p, case_graph("clt"), rows, n=5)
    assert len(found.cells) == 5
