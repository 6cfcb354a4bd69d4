"""Which tokens a graph explains, and along which direction."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, close

from jaxclt.errors import InputError
from jaxclt.graph.targets import demeaned_unembedding, salient_targets, token_targets
from jaxclt.lm.run import unembed

pytestmark = pytest.mark.usefixtures("x64")


def probabilities(name: str) -> np.ndarray:
    t = case(name)
    logit_V = np.asarray(unembed(t.params, t.recording.out_TD))[-1]
    p = np.exp(logit_V - logit_V.max())
    return p / p.sum()


def test_edges_into_all_logits_cancel() -> None:
    """Maths 5.2: targets are logits minus their mean, whose sum no source moves."""
    t = case("clt")
    every = jnp.arange(t.cfg.d_vocab, dtype=jnp.int32)
    targets = token_targets(t.params, t.recording.out_TD[-1], every)
    graph = dataclasses.replace(t, targets=targets).graph()
    edge_VN = graph.edge_RN[graph.target_rows]
    assert len(edge_VN) == t.cfg.d_vocab
    assert np.abs(edge_VN.sum(0)).max() < 1e-13 * np.abs(edge_VN).max()
    assert abs(graph.bias_R[graph.target_rows].sum()) < 1e-13
    close(graph.target_prob_K, probabilities("clt"), 1e-13)


@pytest.mark.parametrize("name", ["clt", "span2"])
def test_a_target_reads_its_logit_minus_the_mean(name: str) -> None:
    """Tied and untied."""
    t = case(name)
    logit_V = np.asarray(unembed(t.params, t.recording.out_TD))[-1]
    token = np.array([3, 17], np.int32)
    got = np.asarray(demeaned_unembedding(t.params, token)) @ t.recording.out_TD[-1]
    close(got, (logit_V - logit_V.mean())[token], 1e-13)


def test_enough_targets_to_hold_the_mass() -> None:
    """Maths 5.3: the fewest top tokens that hold the mass, ten at most."""
    t = case("clt")
    prob = np.sort(probabilities("clt"))[::-1]
    out_D = t.recording.out_TD[-1]
    for mass in (0.1, 0.3, 0.5):
        K = len(salient_targets(t.params, out_D, mass=mass).token_K)
        assert prob[:K].sum() >= mass > prob[: K - 1].sum()
    targets = salient_targets(t.params, out_D)
    assert prob[:10].sum() < 0.95  # so the cap is what ends it
    assert len(targets.token_K) == 10
    close(targets.weight_K, prob[:10], 1e-13)


def test_a_certain_prediction_has_one_target() -> None:
    """Maths 5.3: p = 1 gives K = 1."""
    t = case("clt")
    sure = salient_targets(t.params, t.recording.out_TD[-1] * 1e3)
    assert sure.token_K.tolist() == [int(probabilities("clt").argmax())]
    assert float(sure.weight_K[0]) == 1.0


def test_no_preference_has_ten_targets_in_order() -> None:
    """Maths 5.3: the cap, and ties by token id."""
    t = case("clt")
    flat = salient_targets(t.params, jnp.zeros_like(t.recording.out_TD[-1]))
    assert flat.token_K.tolist() == list(range(10))


def test_a_broken_model_is_refused() -> None:
    t = case("clt")
    with pytest.raises(InputError, match="not finite"):
        salient_targets(t.params, t.recording.out_TD[-1] * jnp.nan)
