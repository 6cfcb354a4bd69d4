"""What a validation measures: foils, contrasts, massive positions."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

import jaxclt
from jaxclt.errors import InputError
from jaxclt.lm.massive import massive_positions
from jaxclt.patching.subject import Subject
from jaxclt.validation.ablations import Bench, Counter
from jaxclt.validation.choice import ValidateOptions, choose
from jaxclt.validation.lines import line, token_agreement, within_2

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = jaxclt.load_model(GOLDEN / "model")
    clt = jaxclt.load_dictionary(GOLDEN / "dictionary", model)
    graph = jaxclt.attribute(model, clt, PROMPT, tolerance=0.0)
    return Subject.of(model, clt, graph)


def bench(subject: Subject, foil: int | None = None) -> Bench:
    options, key = ValidateOptions(n_features=3, foil=foil), jax.random.key(0)
    return Bench(
        subject=subject,
        options=options,
        choice=choose(subject.graph, options, None, key),
        key=key,
        counter=Counter(lambda done, planned: None, 1),
    )


def test_the_foil_is_the_one_asked_for_or_the_runner_up(subject: Subject):
    graph, p = subject.graph, subject.model.params
    own = graph.target_token_K.tolist()
    usual = bench(subject)
    assert usual.token_K.tolist() == own
    assert usual.weight_K.tolist() == [1, -1, *[0] * (len(own) - 2)]
    assert usual.on == "targets"
    assert usual.probability == pytest.approx(float(graph.target_prob_K[0]), rel=1e-4)
    other = next(t for t in range(p.embed_VD.shape[0]) if t not in own)
    asked = bench(subject, other)
    assert asked.token_K.tolist() == [*own, other]
    assert asked.weight_K.tolist() == [1, *[0] * (len(own) - 1), -1]
    assert asked.on == "contrast"
    x_BK = np.arange(2.0 * len(asked.token_K)).reshape(2, -1)
    assert asked.measure(x_BK, "targets").tolist() == x_BK[:, : len(own)].tolist()
    want = (x_BK[:, 0] - x_BK[:, -1])[:, None]
    assert asked.measure(x_BK, "contrast").tolist() == want.tolist()
    with pytest.raises(InputError, match="the foil is the answer itself"):
        _ = bench(subject, own[0]).token_K


def test_a_graph_of_directions_is_measured_on_the_models_answer(subject: Subject):
    """Its rows of both tokens are those of a graph that has them for targets."""
    graph = subject.graph
    blind = dataclasses.replace(graph, target_token_K=np.full(graph.n_targets, -1))
    seen = bench(dataclasses.replace(subject, traced=blind))
    top_two = graph.target_token_K[np.argsort(-graph.target_prob_K)[:2]]
    assert seen.token_K.tolist() == top_two.tolist()
    assert seen.weight_K.tolist() == [1, -1]
    assert seen.n_targets == 2
    want_KA = bench(subject).effect_KA[np.argsort(-graph.target_prob_K)[:2]]
    np.testing.assert_allclose(seen.effect_KA, want_KA, rtol=2e-3, atol=1e-5)


def test_features_without_a_way_to_the_targets_are_not_drawn(subject: Subject):
    graph = subject.graph
    silent = np.argsort(-graph.influence_N[: graph.n_features])[5:]
    influence_N = graph.influence_N.copy()
    influence_N[silent] = 0
    cut = dataclasses.replace(graph, influence_N=influence_N)
    options = ValidateOptions(n_features=3)
    choice = choose(cut, options, None, jax.random.key(0))
    assert len(choice.node_B) == 5
    assert not set(choice.node_B.tolist()) & set(silent.tolist())


def test_massive_positions_are_found_wherever_they_are():
    stream_LTD = np.ones((3, 6, 4), np.float32)
    stream_LTD[1, 4] = 10.5
    stream_LTD[0, 1] = 9.5
    stream_LTD[2, 5] = 1000.0  # of the padding

    def found(x_LTD: np.ndarray) -> list[int]:
        recording = types.SimpleNamespace(mid_LTD=x_LTD)
        return massive_positions(recording, 5).tolist()  # pyright: ignore

    assert found(stream_LTD) == [4]
    assert found(np.ones((3, 6, 4))) == []


def test_a_line_of_nothing_says_nothing():
    found = line(np.zeros((0, 2)), np.zeros((0, 2)), jax.random.key(0))
    assert found["n"] == 0
    assert all(found[x] is None for x in ("spearman", "sign", "slope", "within_2"))
    x, y = np.array([1.0, 1, 1, -2]), np.array([0.5, 2.0, 2.1, 1.0])
    assert within_2(x, y) == 0.5


def test_token_shares_against_scipy():
    """Maths 16.15: with sizes of effects, of all tokens and of all but massive ones."""
    share, effect = [0.5, 0.1, 0.3, 0.05, 0.05], [0.1, -2.0, -3.0, 0.2, -0.4]
    tokens = [
        {"position": i, "effect": e, "share": s}
        for i, (s, e) in enumerate(zip(share, effect, strict=True))
    ]
    found = token_agreement(tokens, np.array([0]))
    assert found is not None
    want = scipy.stats.spearmanr(share, np.abs(effect)).statistic
    later = scipy.stats.spearmanr(share[1:], np.abs(effect[1:])).statistic
    assert found["spearman"] == pytest.approx(want, abs=1e-6)
    assert found["without_massive"] == pytest.approx(later, abs=1e-6)
    assert found["massive"] == [0]
    tokens[3]["share"] = None
    assert token_agreement(tokens, np.array([0])) is None
