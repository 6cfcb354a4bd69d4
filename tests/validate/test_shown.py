"""Necessity and sufficiency of the shown graph (maths 16.14).

Against a planted circuit, where both are 1, and the bundled adder brute-forced in
float64 numpy from its weights.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.errors import InputError
from jaxclt.lm.run import record
from jaxclt.patching.effects import Ask
from jaxclt.patching.local import make_local
from jaxclt.patching.patchable import make_patchable
from jaxclt.testing import tiny
from jaxclt.validation.shown import Measure, check_reference, shown

FIRST, SECOND, IDLE, TOKEN, FOIL = (0, 5, 3), (2, 5, 7), 4, 11, 4


class Planted:
    """Neurons 3 of layer 0 and 7 of layer 2 alone move the answer, at position 5.

    Attention writes nothing, so other positions do not count; neuron 4 of layer 1 is
    active everywhere and writes nothing.
    """

    def __init__(self) -> None:
        t = tiny(7, dtype=jnp.float64)
        b = t.params.blocks
        L, D, I = b.up_LDI.shape
        way_D = np.asarray(jax.random.normal(jax.random.key(1), (D,), jnp.float64))
        unembed_DV = np.asarray(t.params.unembed_DV)
        read_D = np.asarray(t.recording.embed_TD)[5]
        up, down = np.zeros((L, D, I)), np.zeros((L, I, D))
        up[0, :, 3] = read_D / np.linalg.norm(read_D)
        down[0, 3] = 3 * way_D
        up[1, :, IDLE] = way_D
        up[2, :, 7] = way_D
        down[2, 7] = unembed_DV[:, TOKEN] - unembed_DV[:, FOIL]
        blocks = dataclasses.replace(
            b,
            gate_LDI=jnp.zeros(up.shape),
            gate_bias_LI=jnp.full((L, I), 2.0),
            up_LDI=jnp.asarray(up),
            up_bias_LI=jnp.zeros((L, I)),
            down_LID=jnp.asarray(down),
            o_LHCD=jnp.zeros(np.shape(b.o_LHCD)),
        )
        self.params = dataclasses.replace(t.params, blocks=blocks)
        self.cfg = t.cfg
        run = jax.jit(record, static_argnames="cfg")
        self.recording = run(self.params, t.token_T, cfg=t.cfg)
        dictionary = NeuronDictionary(8)
        model = make_patchable(dictionary, self.params, self.recording, t.cfg)
        active = active_features(dictionary, self.params, self.recording, t.cfg)
        self.patchable, self.local = model, make_local(dictionary, model, active)
        self.n_tokens = len(t.token_T)

    def subject(self, places: list[tuple[int, int, int]]) -> Any:
        """A traced prompt of which some features are shown."""
        graph = SimpleNamespace(
            pruning=SimpleNamespace(keep_N=np.ones(len(places), bool)),
            feature_cols=slice(0, len(places)),
            feature=lambda a: places[a],
        )
        return SimpleNamespace(
            patchable=self.patchable,
            local=self.local,
            graph=graph,
            n_tokens=self.n_tokens,
        )

    def measure(self) -> Measure:
        last = jnp.asarray(5, jnp.int32)
        return Measure(Ask(jnp.asarray([TOKEN, FOIL]), last), np.array([1.0, -1.0]))


@pytest.fixture(scope="module")
def planted() -> Any:
    with jax.enable_x64(True):
        made = Planted()
        yield made


def found(planted: Planted, places: list[tuple[int, int, int]]) -> dict[str, Any]:
    key = jax.random.key(0)
    with jax.enable_x64(True):
        return shown(planted.subject(places), planted.measure(), key, n_random=2)


@pytest.mark.parametrize("semantics", ["clamped", "live"])
def test_a_planted_circuit_is_necessary_and_sufficient(
    planted: Planted, semantics: str
):
    one = found(planted, [FIRST, SECOND])[semantics]
    assert one["sufficiency"] == pytest.approx(1, abs=1e-6)
    assert one["necessity"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("semantics", ["clamped", "live"])
def test_what_does_not_matter_is_neither(planted: Planted, semantics: str):
    one = found(planted, [(1, 5, IDLE), (0, 2, 3)])[semantics]
    assert one["sufficiency"] == pytest.approx(0, abs=1e-6)
    assert one["necessity"] == pytest.approx(0, abs=1e-6)


def test_what_is_not_shown_may_be_held_at_another_prompt(planted: Planted):
    """At values of twice and of none of the circuit: m(none) is what these make."""
    subject, places = planted.subject([FIRST]), [FIRST, SECOND]
    key = jax.random.key(0)
    clean_LTU = np.asarray(subject.local.tables.clean_LTU)
    m_zero = found(planted, places)["clamped"]["m"]
    for factor in (0.0, 2.0):
        other = planted.subject(places)
        tables = dataclasses.replace(
            other.local.tables, clean_LTU=jnp.asarray(factor * clean_LTU)
        )
        other.local = dataclasses.replace(other.local, tables=tables)
        with jax.enable_x64(True):
            one = shown(
                planted.subject(places), planted.measure(), key,
                reference=other, n_random=2,
            )  # fmt: skip
        assert one["reference"] == "counterfactual prompt"
        m = one["clamped"]["m"]
        want = m_zero["none"] + factor * (m_zero["all"] - m_zero["none"])
        assert m["none"] == pytest.approx(want, abs=3e-6)
        assert m["keep"] == pytest.approx(m["all"], abs=3e-6)
    longer = planted.subject(places)
    longer.n_tokens += 1
    with pytest.raises(InputError, match="7 tokens, the traced one 6: give one of as"):
        check_reference(subject, longer)


def test_a_prompt_has_no_interval_and_its_random_sets_have(planted: Planted):
    got = found(planted, [FIRST, SECOND])
    assert got["intervals"] == {"necessity": None, "sufficiency": None}
    assert got["n"] == 2 < got["n_active"]
    low, high = got["live"]["random"]["sufficiency"]["interval"]
    assert low <= got["live"]["random"]["sufficiency"]["mean"] <= high
