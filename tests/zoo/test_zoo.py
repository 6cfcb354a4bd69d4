"""Planted models compute what they should, and the true dictionaries recover them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learned import learn
from planted import LOGIT, SHARP, Planted, absolute, induction, true_dictionary, two_hop
from recovery import case_graph, hidden, match, record_prompt, recover

from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph.certificate import certificate
from jaxclt.lm.run import forward, unembed
from jaxclt.patching.batch import default_range
from jaxclt.patching.change import Change
from jaxclt.patching.features import gather_features
from jaxclt.patching.how import How
from jaxclt.patching.modes import patched
from jaxclt.patching.patchable import make_patchable

pytestmark = pytest.mark.usefixtures("x64")

near = pytest.approx


@functools.cache
def member(name: str) -> Planted:
    with jax.enable_x64(True):
        if name == "two_hop":
            return two_hop(8, 4, dtype=jnp.float64)
        if name == "absolute":
            return absolute(3, 20, dtype=jnp.float64)
        soft = name == "soft induction"
        return induction(6, 7, soft=soft, n_prompts=12, dtype=jnp.float64)


def logits(planted: Planted) -> np.ndarray:
    token_PT = np.stack([case.token_T for case in planted.cases])
    one = functools.partial(forward, planted.params, cfg=planted.cfg)
    return np.asarray(jax.jit(jax.vmap(one))(token_PT))[:, -1]


@pytest.mark.parametrize("name", ["two_hop", "induction"])
def test_lookups_give_the_one_right_answer(name: str) -> None:
    planted = member(name)
    logit_PV = logits(planted)
    answer_P = [case.answer["answer"] for case in planted.cases]
    want_PV = LOGIT * np.eye(planted.cfg.d_vocab)[answer_P]
    np.testing.assert_allclose(logit_PV, want_PV, atol=1e-3)


def test_two_hops_are_the_composition() -> None:
    answers = [case.answer["answer"] - 8 for case in member("two_hop").cases]
    assert answers == [(i % 4 + 1) % 4 for i in range(8)]


def test_absolute_values() -> None:
    """To within twice the smoothing of a gate, 0.28 / SHARP, times the logit."""
    planted = member("absolute")
    point_PN = np.asarray(planted.params.embed_VD)[:20, 1:4]
    got_PN = logits(planted)[:, planted.readout_K]
    np.testing.assert_allclose(
        got_PN, LOGIT * np.abs(point_PN), atol=2 * 0.28 * LOGIT / SHARP
    )
    assert (planted.train_PT == 0).mean() == near(0.5, abs=0.03)


def test_the_induction_heads_attend_as_planted() -> None:
    planted = member("induction")
    for case in planted.cases[:3]:
        rec = record_prompt(planted.params, case.token_T, planted.cfg)
        pattern_LTS = np.asarray(rec.frozen.pattern_LHTS)[:, 0]
        np.testing.assert_allclose(pattern_LTS[0], np.eye(7)[[0, *range(6)]], atol=1e-6)
        assert pattern_LTS[1, -1, case.source] == near(1, abs=1e-6)
        assert case.token_T[case.source] == case.answer["answer"]
        assert case.token_T[case.source - 1] == case.token_T[-1]


@pytest.mark.parametrize(
    ("name", "span"),
    [
        ("two_hop", 2),
        ("absolute", 1),
        pytest.param("two_hop", 1, marks=pytest.mark.slow),
        pytest.param("induction", 1, marks=pytest.mark.slow),
        pytest.param("induction", 2, marks=pytest.mark.slow),
    ],
)
def test_the_true_dictionary_recovers_the_circuit(name: str, span: int) -> None:
    """Span 2 is a CLT, whose later writes are zero."""
    planted = member(name)
    dictionary = true_dictionary(planted, span=span)
    nodes = {unit.node for unit in planted.units}
    assert set(match(planted, dictionary).values()) == nodes
    found = recover(planted, dictionary, planted.cases[:2])
    rest = dataclasses.asdict(found)
    # All but what gates smooth: relu units are 0.28 / SHARP off at worst.
    slack = 5e-3 if name == "absolute" else 1e-6
    for score in ("true", "recall", "precision"):
        assert rest.pop(score) == near(1, abs=slack), score
    assert all(value == near(0, abs=slack) for value in rest.values()), rest


@pytest.mark.parametrize("name", ["two_hop", "absolute", "induction"])
def test_the_graph_is_the_known_graph(name: str) -> None:
    """Every edge: z times the weight, which is the value handed on."""
    planted = member(name)
    case = planted.cases[1]
    graph = case_graph(planted, true_dictionary(planted), case)
    assert certificate(graph).max_relative_row_error < 1e-9
    on_A = np.array(
        [planted.units[f].node if graph.n_layers == 1 else "" for f in graph.feature_A]
    )
    A, K = graph.n_features, graph.n_targets
    want_RN = np.zeros_like(graph.edge_RN)
    source = graph.embed_cols.start + case.source
    if name == "two_hop":
        want_RN[0, source], want_RN[1, 0], want_RN[2, 1] = 1, 1, LOGIT
    elif name == "absolute":
        want_RN[:A, source] = graph.value_A
        for k, y in enumerate(case.answer):
            own = on_A == y.replace("y", "x")
            want_RN[A + k, :A] = LOGIT * graph.value_A * own
        assert K == 3
    else:
        # The copy reads the token found; keys read the tokens before theirs, queries
        # their own, and both feed nothing, though they are why it was found.
        for a in range(A - 1):
            back = planted.units[graph.feature_A[a]].node == "key"
            want_RN[a, graph.embed_cols.start + graph.pos_A[a] - back] = 1
        want_RN[A - 1, source], want_RN[A, A - 1] = 1, LOGIT
    feature_or_token = np.ones(graph.edge_RN.shape[1], bool)
    feature_or_token[graph.error_cols] = False
    np.testing.assert_allclose(
        graph.edge_RN[:, feature_or_token], want_RN[:, feature_or_token], atol=1e-4
    )


def test_an_induction_graph_does_not_say_why_the_head_attends() -> None:
    planted = member("induction")
    found = hidden(planted, true_dictionary(planted), planted.cases[:2])
    assert found.key_influence == found.query_influence == 0
    assert found.key_frozen == near(0, abs=1e-9)
    assert found.query_frozen == near(0, abs=1e-9)
    assert found.key_live == near(1, abs=1e-6)
    assert found.query_live == near(1, abs=1e-6)
    # Nor does a small change: the softmax is all but 1 there. A swap of the query does.
    assert found.key_effect == near(0, abs=1e-7)
    assert found.query_effect == near(0, abs=1e-7)
    assert found.query_swap == near(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["true", "neurons"])
def test_by_response_key_and_query_are_found(kind: str) -> None:
    """Maths 22.80: what decides where a soft head attends has influence, and what the
    graph predicts of it is measured.

    A softmax of score 3 against six zeros gives 0.77 to the token found. A tenth less
    of the score takes 0.3 * 0.77 * 0.23 of it to first order, and 7% more in truth.
    """
    planted = member("soft induction")
    dictionary = true_dictionary(planted) if kind == "true" else NeuronDictionary()
    found = hidden(planted, dictionary, planted.cases[:2])
    assert max(found.key_influence, found.query_influence) < 1e-6
    assert min(found.key_response, found.query_response) > 0.05
    assert min(found.key_effect, found.query_effect) > 0.4
    assert found.key_small == near(0.07, abs=0.01)
    assert found.query_small == near(0.07, abs=0.01)
    # A neuron's gate, held, knows no other query.
    assert found.query_swap < 0.01 or kind == "neurons"


def test_what_neurons_hide() -> None:
    """Frozen gates: a signal that runs through the gate alone has no edges at all."""
    planted = member("absolute")
    found = recover(planted, NeuronDictionary(), planted.cases[:1])
    assert found.recall == 1
    assert found.true == 0
    assert found.bias == near(1, abs=1e-6)
    assert found.swap == near(1, abs=1e-2)


@pytest.mark.slow
def test_neurons_find_lookups_but_not_other_values() -> None:
    planted = member("two_hop")
    found = recover(planted, NeuronDictionary(), planted.cases[:1])
    assert found.true == near(1, abs=1e-6)
    # The old answer goes, the new one does not come, since its gate stays shut.
    assert found.swap == near(0.5**0.5, abs=1e-6)


@pytest.mark.slow
def test_sparsity_makes_a_clt_skip_the_second_hop() -> None:
    """Reconstruction is perfect, the second hop is gone, a PLT keeps it."""
    planted = two_hop()
    clt = learn(planted, span=2, sparsity=0.01)
    plt = learn(planted, span=1, sparsity=0.01)
    assert max(clt.fvu_L.max(), plt.fvu_L.max()) < 1e-3
    assert clt.l0_L[1] < 0.1 < 0.9 < plt.l0_L[1]
    skipped = recover(planted, clt.dictionary, planted.cases[:4])
    kept = recover(planted, plt.dictionary, planted.cases[:4])
    assert skipped.shortcut > 0.5
    assert skipped.swap > 0.9
    assert kept.shortcut < 0.01
    assert kept.swap < 0.6


def test_a_patch_lets_the_second_hop_answer() -> None:
    """Without a layer range: taking b away takes c away, as the model itself says.

    A range that holds the last MLP too would leave the answer as it is: the first hop
    writes nothing to it.
    """
    planted = member("two_hop")
    dictionary, case = true_dictionary(planted, span=2), planted.cases[1]
    rec = record_prompt(planted.params, case.token_T, planted.cfg)
    model = make_patchable(dictionary, planted.params, rec, planted.cfg)
    first_hop = [(0, 0, 1)]  # layer, position, feature
    change = Change.of(gather_features(dictionary, model, first_hop))

    def answer(layers: tuple[int, int]) -> float:
        done = patched(model, change, jnp.asarray(layers, jnp.int32), how=How())
        return float(unembed(planted.params, done.out_TD[-1])[case.answer["answer"]])

    edited = {"layer_E": np.array([0]), "span": 2, "n_layers": 2}
    assert answer(default_range(**edited, mode="constrained")) == near(0, abs=1e-3)
    assert answer((0, 1)) == near(LOGIT, abs=1e-3)
