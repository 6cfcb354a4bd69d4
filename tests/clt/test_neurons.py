"""The model's own neurons as a dictionary: exact with all of them."""

from __future__ import annotations

import numpy as np
import pytest
from cases import MODELS, case, close

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary, parse_neurons
from jaxclt.errors import InputError
from jaxclt.replacement.errors import error_nodes

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", MODELS)
def test_all_neurons_leave_no_error(name: str) -> None:
    t = case(name)
    active = active_features(NeuronDictionary(), t.params, t.recording, t.cfg)
    assert len(active.layer_A) == t.cfg.n_layers * len(t.token_T) * t.cfg.d_mlp
    size = np.abs(np.asarray(t.recording.write_LTD)).max()
    assert np.abs(error_nodes(active, t.recording)).max() < 1e-14 * size


@pytest.mark.parametrize("k", [None, 5])
def test_a_neuron_is_linear_in_the_stream(k: int | None) -> None:
    """Its row with the gate frozen gives its activation, of either sign."""
    t = case("clt")
    active = active_features(NeuronDictionary(k), t.params, t.recording, t.cfg)
    mid_AD = np.asarray(t.recording.mid_LTD)[active.layer_A, active.pos_A]
    close((active.reads() * mid_AD).sum(1) + active.read_bias_A, active.value_A, 1e-13)
    assert (active.value_A < 0).any()


def test_k_neurons_are_the_strongest() -> None:
    t = case("clt")
    every = active_features(NeuronDictionary(), t.params, t.recording, t.cfg)
    few = active_features(NeuronDictionary(5), t.params, t.recording, t.cfg)
    shape = (t.cfg.n_layers, len(t.token_T), t.cfg.d_mlp)
    value = every.value_A.reshape(shape)
    norm_LI = np.linalg.norm(np.asarray(t.params.blocks.down_LID), axis=-1)
    written = np.abs(value) * norm_LI[:, None]
    chosen = np.zeros(shape, bool)
    chosen[few.layer_A, few.pos_A, few.feature_A] = True
    assert (chosen.sum(-1) == 5).all()
    weakest_in = np.where(chosen, written, np.inf).min(-1)
    strongest_out = np.where(chosen, 0, written).max(-1)
    assert (weakest_in > strongest_out).all()
    close(few.value_A, value[chosen], 1e-14)


def test_names() -> None:
    assert parse_neurons("neurons") == NeuronDictionary()
    assert parse_neurons("neurons:32") == NeuronDictionary(32)
    assert parse_neurons("neuron") is None
    assert NeuronDictionary(32).name == "neurons:32"
    for bad in ("neurons:0", "neurons:x", "neurons:-1"):
        with pytest.raises(InputError, match="neurons:k"):
            parse_neurons(bad)
