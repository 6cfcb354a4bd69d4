"""The model's own derivative against finite differences of the model."""

from __future__ import annotations

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILY_CASES, OWN_MAPS, case, case_active, close, column_writes

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph import derivative
from jaxclt.graph.derivative import model_derivative
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.targets import combine_targets, functional_targets, salient_targets
from jaxclt.lm.layers import mlp_at
from jaxclt.lm.run import Policy, record, run
from jaxclt.types import Targets

pytestmark = pytest.mark.usefixtures("x64")

DICTIONARIES = ("clt", "plt", "skip", "span2")
CASES = [
    name if name in (*DICTIONARIES, *OWN_MAPS) else pytest.param(name, marks=slow)
    for slow in [pytest.mark.slow]
    for name in (*DICTIONARIES, *FAMILY_CASES)
]
STEP = 2e-5


@functools.cache
def targets_of(name: str) -> Targets:
    """Logits, and directions of the stream and of what MLPs write elsewhere."""
    t = case(name)
    vec_3D = np.asarray(jax.random.normal(jax.random.key(3), (3, t.cfg.d_model)))
    places = (("resid_mid:2", 3), ("mlp_out:1", 4), ("resid_post:2", 2), ("out", 1))
    parts = [salient_targets(t.params, t.recording.out_TD[-1], most=3)]
    parts += [
        functional_targets(t.params, t.recording, site, pos, vec_3D[:1], cfg=t.cfg)
        for site, pos in places
    ]
    return combine_targets(parts)


def prompt_of(name: str, active: Active | None = None) -> Prompt:
    t = case(name)
    active = case_active(name) if active is None else active
    return Prompt(t.params, t.recording, active, targets_of(name), cfg=t.cfg)


@functools.cache
def readouts(name: str):
    """Targets of the model when embeddings and MLP outputs are changed, [B, K]."""
    t, targets = case(name), targets_of(name)
    vec_KD, write_KD = jnp.asarray(targets.vec_KD), jnp.asarray(targets.write_KD)
    layer_K, pos_K = np.asarray(targets.layer_K), np.asarray(targets.pos_K)
    at_output = jnp.asarray(layer_K == t.cfg.n_layers)[:, None]
    place = (np.minimum(layer_K, t.cfg.n_layers - 1), pos_K)

    def read(change_STD: jax.Array) -> jax.Array:
        def write(carry, mid_TD, scale_T, p, added_TD):
            return carry, mlp_at(p, mid_TD, scale_T, cfg=t.cfg)[0] + added_TD

        embed_TD = t.recording.embed_TD + change_STD[0]
        policy = Policy(write, None, change_STD[1:])
        done = run(t.params, embed_TD, policy, cfg=t.cfg)
        x_KD = jnp.where(at_output, done.out_TD[pos_K], done.taps.mid_TD[place])
        return (vec_KD * x_KD + write_KD * done.taps.write_TD[place]).sum(1)

    return jax.jit(jax.vmap(read))


@pytest.mark.parametrize("neurons", [False, True], ids=["dictionary", "neurons"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_slope_of_the_model(name: str, neurons: bool) -> None:
    """Maths 22.40: what each of 64 nodes writes a little more and a little less."""
    t, active = case(name), case_active(name)
    if neurons:
        active = active_features(NeuronDictionary(5), t.params, t.recording, t.cfg)
    got_KN = model_derivative(prompt_of(name, active))
    change = column_writes(t, active, neurons=neurons)
    assert len(change) == got_KN.shape[1]
    some = np.linspace(0, len(change) - 1, 64).astype(int)
    up, down = (np.asarray(readouts(name)(x * change[some])) for x in (STEP, -STEP))
    want_KN = (up - down).T / (2 * STEP)
    assert np.abs(want_KN).max(1).all()
    close(got_KN[:, some], want_KN, 1e-7)


def test_what_comes_after_the_prompt_changes_nothing() -> None:
    """A prompt of four tokens, alone and with two more after it."""
    t, n = case("clt"), 4
    targets = salient_targets(t.params, t.recording.out_TD[n - 1], most=3)
    alone = jax.jit(partial(record, cfg=t.cfg))(t.params, t.token_T[:n])
    got, want = (
        model_derivative(
            Prompt(
                t.params,
                recording,
                active_features(t.dictionary, t.params, recording, t.cfg),
                targets,
                cfg=t.cfg,
                n_tokens=n,
            )
        )
        for recording in (t.recording, alone)
    )
    close(got, want, 1e-13)


def test_many_targets_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cotangents are held together, one passes a layer at a time."""
    p = prompt_of("plt")
    want = model_derivative(p)
    assert p.n_targets == 7
    monkeypatch.setattr(derivative, "_TARGETS", (2,))
    monkeypatch.setattr(derivative, "_TOGETHER", 1)
    close(model_derivative(p), want, 1e-13)
