"""Ablations where attention and norms are live and gates held (maths 22.70)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, case_active, close

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.clt.sites import read_site
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.response import by_response
from jaxclt.lm import layers
from jaxclt.lm.block import block
from jaxclt.lm.run import Run
from jaxclt.patching.change import Change
from jaxclt.patching.features import gather_features
from jaxclt.patching.finite import FINITE
from jaxclt.patching.local import make_local
from jaxclt.patching.modes import patched
from jaxclt.patching.patchable import Patchable, make_patchable
from jaxclt.testing import Tiny

pytestmark = pytest.mark.usefixtures("x64")


@functools.partial(jax.jit, static_argnames="how")
def run_jit(model: Patchable, change: Change, tables: Any, how: Any) -> Run:
    layers_2 = jnp.asarray([0, model.cfg.n_layers - 1], jnp.int32)
    return patched(model, change, layers_2, how=how, tables=tables)


def patched_one(
    t: Tiny, dictionary: Any, active: Active, s: int, factor: float = 0.0
) -> Run:
    """A feature by its slot, in the library's way."""
    model = make_patchable(dictionary, t.params, t.recording, t.cfg)
    place = (int(active.layer_A[s]), int(active.pos_A[s]), int(active.feature_A[s]))
    change = Change.of(gather_features(dictionary, model, [place]), factor)
    local = make_local(dictionary, model, active)
    return run_jit(model, local.placed(change), local.tables, FINITE)


def first_of(active: Active, layer: int) -> int:
    """The strongest feature of a layer after the first position."""
    here = np.flatnonzero((active.layer_A == layer) & (active.pos_A == 1))
    return int(here[np.abs(active.value_A[here]).argmax()])


def live_layers(t: Tiny, write: Any) -> np.ndarray:
    """The output of live blocks in turn, with something in MLPs' places."""
    resid_TD = t.recording.embed_TD
    for l in range(t.cfg.n_layers):
        p = jax.tree.map(lambda x, l=l: x[l], t.params.blocks)
        put = functools.partial(write, l, p)
        resid_TD, _ = block(p, resid_TD, put, cfg=t.cfg)
    norm = layers.out_norm(t.params)
    scale_T = layers.norm_scale(resid_TD, norm, eps=t.cfg.norm_eps)
    return layers.normalise(resid_TD, scale_T, norm)


@pytest.mark.parametrize(
    "name", ["skip", "gemma3", pytest.param("neox", marks=pytest.mark.slow)]
)
def test_it_is_the_dictionary_in_live_layers_with_gates_and_errors_held(name: str):
    t, a, rec = case(name), case_active(name), case(name).recording
    s, clt, L = first_of(a, 1), t.clt, t.cfg.n_layers
    on_LTF = np.zeros((L, len(t.token_T), t.clt_cfg.n_features), bool)
    on_LTF[a.layer_A, a.pos_A, a.feature_A] = True

    def made(l: int, a_lTF: list[Any], read_TD: Any) -> Any:
        """What the dictionary writes at a layer."""
        written = [a_lTF[k] @ clt.W_dec[k][:, l - k] for k in range(l + 1)]
        skip = 0 if clt.W_skip_LDD is None else read_TD @ clt.W_skip_LDD[l]
        return sum(written) + clt.b_dec_LD[l][None] + skip

    def encoded(l: int, read_TD: Any) -> Any:
        h_TF = read_TD @ clt.W_enc_LFD[l].T + clt.b_enc_LF[l][None]
        return jnp.where(on_LTF[l], h_TF, 0.0)

    def by_hand(held: Any) -> Any:
        was, now = [], []

        def write(l: int, p: Any, mid_TD: Any, scale_T: Any) -> Any:
            read = functools.partial(read_site, t.clt_cfg.read, layers.mlp_norm(p))
            clean_TD = read(rec.mid_LTD[l], rec.frozen.mlp_scale_LT[l])
            read_TD = read(mid_TD, scale_T)
            was.append(encoded(l, clean_TD))
            now.append(encoded(l, read_TD))
            if l == a.layer_A[s]:
                now[l] = now[l].at[a.pos_A[s], a.feature_A[s]].set(held)
            error_TD = rec.write_LTD[l] - made(l, was, clean_TD)
            return made(l, now, read_TD) + error_TD

        return live_layers(t, write)

    hand = jax.jit(by_hand)
    close(hand(a.value_A[s]), rec.out_TD, 1e-12)
    want = hand(0.0)
    close(patched_one(t, t.dictionary, a, s).out_TD, want, 1e-12)
    assert np.abs(want - rec.out_TD).max() > 1e-3


@pytest.mark.parametrize("name", ["skip", pytest.param("neox", marks=pytest.mark.slow)])
def test_its_slope_is_the_total_effect_by_response(name: str):
    """If all active features are nodes; gates flip no one so close."""
    t, a, h = case(name), case_active(name), 1e-5
    config = AttributeConfig(max_features=None, tolerance=0.0, devices=1, response=True)
    graph = t.graph(config, dictionary=t.dictionary)
    s, vec_KD = first_of(a, 1), np.asarray(t.targets.vec_KD)
    up, down = (
        vec_KD @ np.asarray(patched_one(t, t.dictionary, a, s, 1 + d).out_TD)[-1]
        for d in (h, -h)
    )
    want = solve_total_effect(by_response(graph))[:, s]
    close((up - down) / (2 * h), want, 1e-7)
    assert np.abs(want - solve_total_effect(graph)[:, s]).max() > 1e-4


def test_neurons_keep_their_gates_and_answer_with_the_rest():
    """Behind a norm, whose recorded scale is part of the gate (maths 2.7)."""
    t, rec, dictionary = case("gemma3"), case("gemma3").recording, NeuronDictionary(6)
    a = active_features(dictionary, t.params, rec, t.cfg)
    s = first_of(a, 1)
    kept_LTI = np.zeros((t.cfg.n_layers, len(t.token_T), t.cfg.d_mlp), bool)
    kept_LTI[a.layer_A, a.pos_A, a.feature_A] = True

    def write(l: int, p: Any, mid_TD: Any, scale_T: Any) -> Any:
        norm, clean_T = layers.mlp_norm(p), rec.frozen.mlp_scale_LT[l]
        clean_TD = layers.normalise(rec.mid_LTD[l], clean_T, norm)
        gate_TI, was_TI = layers.gate_and_up(p, clean_TD, cfg=t.cfg)
        gate_TI = gate_TI * rec.frozen.post_mlp_scale_LT[l][:, None]
        gate_TI = jnp.where(kept_LTI[l], gate_TI, 0.0)
        read_TD = layers.normalise(mid_TD, scale_T, norm)
        up_TI = layers.gate_and_up(p, read_TD, cfg=t.cfg)[1]
        now_TI = gate_TI * up_TI
        if l == a.layer_A[s]:
            now_TI = now_TI.at[a.pos_A[s], a.feature_A[s]].set(0)
        change_TD = (now_TI - gate_TI * was_TI) @ (p.down_LID * p.post_mlp_LD[None])
        return rec.write_LTD[l] + change_TD

    want = jax.jit(lambda: live_layers(t, write))()
    close(patched_one(t, dictionary, a, s).out_TD, want, 1e-12)
    assert np.abs(want - rec.out_TD).max() > 1e-3
