"""Sets of planted circuits are found exactly, and passes are those of plain numpy."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case
from planted import LOGIT, Planted, induction, true_dictionary, two_hop
from recovery import case_graph, match, record_prompt

from jaxclt.circuits.ablation import MEASURED, Stage, places_of
from jaxclt.circuits.search import Goal, search
from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.lm import layers
from jaxclt.lm.run import Policy, readout, run
from jaxclt.patching.circuit import held_chunk, held_slopes
from jaxclt.patching.effects import Ask
from jaxclt.patching.how import How
from jaxclt.patching.local import make_local, values_on
from jaxclt.patching.patchable import make_patchable
from jaxclt.runs.kept import Answers
from jaxclt.validation.shown import Measure

pytestmark = pytest.mark.usefixtures("x64")
near = pytest.approx


def subject_of(params: Any, cfg: Any, recording: Any, dictionary: Any) -> Any:
    model = make_patchable(dictionary, params, recording, cfg)
    active = active_features(dictionary, params, recording, cfg)
    return SimpleNamespace(
        patchable=model,
        local=make_local(dictionary, model, active),
        n_tokens=len(recording.token_T),
    )


def stage_of(subject: Any, place_A3: np.ndarray, pair: tuple[int, int]) -> Stage:
    """Everything else at zero."""
    clean_LTU = np.asarray(subject.local.tables.clean_LTU)
    last = jnp.asarray(subject.n_tokens - 1, jnp.int32)
    at_A3, there_A = places_of(subject, place_A3)
    assert there_A.all()
    return Stage(
        subject=subject,
        measure_of=Measure(Ask(jnp.asarray(pair), last), np.array([1.0, -1.0])),
        value_LTU=np.zeros_like(clean_LTU),
        held_LTU=clean_LTU != 0,
        place_A3=at_A3,
        kept=Answers(None, MEASURED),
    )


@functools.cache
def member(name: str) -> Planted:
    with jax.enable_x64(True):
        if name == "two_hop":
            return two_hop(8, 4, dtype=jnp.float64)
        return induction(6, 7, n_prompts=12, dtype=jnp.float64)


@pytest.mark.parametrize(
    ("name", "span"),
    [
        pytest.param("two_hop", 1, marks=pytest.mark.slow),
        pytest.param("two_hop", 2, marks=pytest.mark.slow),
        ("induction", 1),
    ],
)
def test_planted_circuits_are_found_exactly(name: str, span: int) -> None:
    """Maths 24.4, and 24.3 at both ends: of all features 1, of none 0.

    Of two hops both. Of an induction head the copy, and why it is made: the key and the
    query, which an attention pattern that is live needs, and no graph by value has.
    """
    planted = member(name)
    dictionary, one = true_dictionary(planted, span=span), planted.cases[1]
    graph = case_graph(planted, dictionary, one)
    place_A3 = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    recording = record_prompt(planted.params, one.token_T, planted.cfg)
    subject = subject_of(planted.params, planted.cfg, recording, dictionary)
    answer = one.answer["answer"]
    foil = next(int(x) for x in planted.readout_K if x != answer)
    stage = stage_of(subject, place_A3, (answer, foil))
    influence_A = graph.influence_N[graph.feature_cols]
    found = search(stage, {"influence": influence_A}, Goal(share=0.95))
    assert found.reached
    matched = match(planted, dictionary)
    nodes = {
        matched.get((int(layer), int(feature)), "")
        for layer, _, feature in place_A3[found.set_A]
    }
    want = {"two_hop": 2}.get(name, 3)
    assert len(nodes) == found.set_A.sum() == want
    for layer, pos, feature in place_A3[found.set_A].tolist():
        assert one.place[matched[layer, feature]] == (layer, pos)
    every = np.ones((1, len(place_A3)), bool)
    assert stage.measure(every).at(0) == near((1, 1), abs=1e-9)
    assert stage.measure(~every).at(0) == near((0, 0), abs=1e-9)
    assert stage.leads["all"] == near(LOGIT, abs=0.7 * LOGIT)
    assert not stage.leads.astray


def held_in_numpy(t: Any, held_LTI: np.ndarray, value_LTI: np.ndarray) -> np.ndarray:
    """Demeaned logits at the end of the model with some neurons put at values."""

    def write(carry: Any, mid_TD: Any, scale_T: Any, p: Any, x: Any) -> Any:
        held_TI, value_TI = x
        read_TD = layers.normalise(mid_TD, scale_T, layers.mlp_norm(p))
        gate_TI, up_TI = layers.gate_and_up(p, read_TD, cfg=t.cfg)
        a_TI = jnp.where(held_TI, value_TI, gate_TI * up_TI)
        return carry, a_TI @ p.down_LID + p.down_bias_LD[None]

    policy = Policy(write, None, (jnp.asarray(held_LTI), jnp.asarray(value_LTI)))
    done = run(t.params, t.recording.embed_TD, policy, cfg=t.cfg)
    logit_V = np.asarray(readout(t.params, done.out_TD[-1]))
    return logit_V - logit_V.mean()


def test_neurons_that_are_held_in_the_model() -> None:
    """Maths 24.2 and its slopes; what `neurons:k` leaves out answers by itself."""
    t = case("clt")
    subject = subject_of(t.params, t.cfg, t.recording, NeuronDictionary(5))
    tables = subject.local.tables
    clean_LTU = np.asarray(tables.clean_LTU)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = 2, *clean_LTU.shape
    held_2LTU = np.array(jax.random.bernoulli(keys[0], 0.4, shape))
    held_2LTU &= (clean_LTU != 0)[None]
    value_LTU = clean_LTU * np.asarray(jax.random.normal(keys[1], clean_LTU.shape))
    pair = jnp.asarray([3, 8])
    ask = Ask(pair, jnp.asarray(subject.n_tokens - 1, jnp.int32))
    how = How(mode="additive", patterns="live", gates="live")
    how = how.of(subject.patchable.coder)
    given = subject.patchable, tables
    for together in (False, True):
        found = held_chunk(
            *given, held_2LTU, value_LTU, ask, how=how, together=together
        )
        for b in range(2):
            want_V = held_in_numpy(t, held_2LTU[b], value_LTU)
            np.testing.assert_allclose(
                np.asarray(found.logit_K)[b], want_V[[3, 8]], rtol=1e-9, atol=1e-11
            )
    weight_K = jnp.asarray([1.0, -1.0])
    slope_2LTU = held_slopes(*given, held_2LTU, value_LTU, ask, weight_K, how=how)
    places = jax.random.permutation(keys[2], np.argwhere(clean_LTU != 0))[:3]
    for place in map(tuple, places.tolist()):
        ends = []
        for step in (1e-5, -1e-5):
            soft_LTU = held_2LTU[0].astype(float)
            soft_LTU[place] += step
            done = held_chunk(*given, soft_LTU[None], value_LTU, ask, how=how)
            ends.append(float(np.asarray(done.logit_K)[0] @ np.array([1, -1])))
        want = (ends[0] - ends[1]) / 2e-5
        assert float(slope_2LTU[0][place]) == near(want, rel=1e-4, abs=1e-8)


def test_values_on_another_recording_are_there_for_all_neurons() -> None:
    """Also of those that `neurons:k` did not choose."""
    t = case("clt")
    few = subject_of(t.params, t.cfg, t.recording, NeuronDictionary(5))
    every = subject_of(t.params, t.cfg, t.recording, NeuronDictionary())
    got = values_on(every.patchable, few.local.tables)
    np.testing.assert_allclose(got, every.local.tables.clean_LTU, atol=1e-12)
