"""The exact identities of the three ways to patch (maths 15), in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FEW, case, case_active, case_graph, close

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.prompt import Prompt
from jaxclt.lm.run import Run, record, unembed
from jaxclt.patching import modes
from jaxclt.patching.change import Change
from jaxclt.patching.edits import Edit
from jaxclt.patching.effects import Ask, Effect, measure_effect, watch_values
from jaxclt.patching.features import gather_features
from jaxclt.patching.generate import continue_prompt, rivals
from jaxclt.patching.how import How
from jaxclt.patching.local import Local, make_local
from jaxclt.patching.patchable import Patchable, make_patchable

pytestmark = pytest.mark.usefixtures("x64")

NORMS_BEHIND = ("gemma2", "gemma3")  # attention and MLPs
GPT2 = pytest.param("gpt2", marks=pytest.mark.slow)

L = 4


@functools.cache
def model(name: str) -> Patchable:
    with jax.enable_x64(True):
        t = case(name)
        return make_patchable(t.dictionary, t.params, t.recording, t.cfg)


@functools.cache
def local(name: str) -> Local:
    with jax.enable_x64(True):
        return make_local(case(name).dictionary, model(name), case_active(name))


@functools.partial(jax.jit, static_argnames="how")
def run_jit(
    model: Patchable, change: Change, layers: Any, how: How, tables: Any = None
) -> Run:
    return modes.patched(model, change, layers, how=how, tables=tables)


measure_jit = jax.jit(measure_effect)


def change_of(name: str, changes: dict[int, float], op: str = "scale") -> Change:
    """What edits of slots of the active features change."""
    a, slots = case_active(name), list(changes)
    places = np.stack([a.layer_A, a.pos_A, a.feature_A], 1)[slots]
    features = gather_features(case(name).dictionary, model(name), places)
    affine_E2 = [
        Edit(layer=0, pos=0, feature=0, **{op: value}).affine
        for value in changes.values()
    ]
    return Change.of(features, *np.array(affine_E2).T)


def patched(
    name: str, changes: dict[int, float], layers: tuple[int, int], **how: Any
) -> Run:
    change, tables = change_of(name, changes, how.pop("op", "scale")), None
    if how.get("mode") == "iterative":
        change, tables = local(name).placed(change), local(name).tables
    range_2 = jnp.asarray(layers, jnp.int32)
    return run_jit(model(name), change, range_2, How(**how), tables)


def effect(name: str, done: Run) -> Effect:
    t = case(name)
    ask = Ask(t.targets.token_K, jnp.asarray(5, jnp.int32), n_top=3)
    return measure_jit(model(name), done, ask)


def source(name: str, layer: int = 1) -> int:
    """A feature in the middle with effects."""
    a, graph = case_active(name), case_graph(name)
    own = np.flatnonzero(a.layer_A == layer)
    strength = np.abs(graph.edge_RN[:, own]).sum(0)
    return int(own[np.argmax(strength)])


def clean_stream(name: str) -> np.ndarray:
    return np.asarray(case(name).recording.mid_LTD)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("clt", "iterative"), ("skip", "iterative")]
    + [
        pytest.param(name, "iterative", marks=pytest.mark.slow)
        for name in CASES
        if name not in ("clt", "skip")
    ]
    + [(name, "constrained") for name in ("clt", "skip")]
    + [(name, "additive") for name in ("clt", "plt", *NORMS_BEHIND)]
    + [("neox", mode) for mode in ("constrained", "iterative", "additive")],
)
def test_a_factor_of_one_changes_nothing(name: str, mode: str):
    """Maths 15.7 for several ranges; the divergence is zero."""
    s = source(name)
    for layers in ((1, 1), (1, 2), (0, L - 1)):
        done = patched(name, {s: 1.0}, layers, mode=mode)
        close(done.taps.mid_TD, clean_stream(name), 1e-13)
        assert abs(float(effect(name, done).kl)) < 1e-13
    if mode == "constrained":
        # Inside the range only what a linear path reads is computed again (by another
        # program than the recording's); so it is the same to the last bit.
        want = case(name).recording.write_LTD
        if case(name).clt.W_skip_LDD is not None:
            want = patched(name, {s: 0.0}, layers, mode=mode, op="add").taps.write_TD
        np.testing.assert_array_equal(done.taps.write_TD, want)


@pytest.mark.parametrize("name", [*FEW, *NORMS_BEHIND, "neox", GPT2])
def test_constrained_patch_moves_features_by_their_edges(name: str):
    """Maths 15.8: range up to the layer below the target, patterns and norms frozen."""
    t, a, graph = case(name), case_active(name), case_graph(name)
    s, M = source(name), -7.0
    for layer in (2, 3):
        own = np.flatnonzero(a.layer_A == layer)
        done = patched(name, {s: M}, (1, layer - 1), norms="frozen")
        change = np.asarray(done.taps.mid_TD) - clean_stream(name)
        moved = (a.reads(own) * change[layer, a.pos_A[own]]).sum(1)
        want = (M - 1) * graph.edge_RN[own, s]
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(moved, want, rtol=0, atol=1e-12)
    live = patched(name, {s: M}, (1, 2), norms="live")
    other = (np.asarray(live.taps.mid_TD) - clean_stream(name))[3]
    assert np.abs(other - change[3]).max() > 1e-6
    del t


@pytest.mark.parametrize("name", [*CASES, *NORMS_BEHIND])
def test_constrained_patch_of_all_layers_is_the_direct_edge_to_the_logits(name: str):
    """Maths 15.9."""
    graph, s, M = case_graph(name), source(name), -2.0
    done = patched(name, {s: M}, (0, L - 1), norms="frozen")
    change = effect(name, done).logit_K - graph.readout_R[graph.target_rows]
    close(change, (M - 1) * graph.edge_RN[graph.target_rows, s], 1e-11)


@pytest.mark.parametrize("name", ["clt", "skip"])
def test_the_stream_behind_the_range_is_affine_and_additive(name: str):
    """Maths 15.10: with frozen norms; the final logits are not, real MLPs follow."""
    s = source(name)
    other = source(name, layer=2)
    clean = clean_stream(name)

    def at(changes: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
        done = patched(name, changes, (1, 2), norms="frozen")
        change = np.asarray(done.taps.mid_TD) - clean
        return change[3], np.asarray(effect(name, done).logit_K)

    (one, logit1), (two, logit2), (three, logit3) = (
        at({s: M, other: 1.0}) for M in (0.0, 2.0, 4.0)
    )
    close(one + three, 2 * two, 1e-11)
    assert np.abs(logit1 + logit3 - 2 * logit2).max() > 1e-5
    both, alone = at({s: 2.0, other: 3.0})[0], at({s: 1.0, other: 3.0})[0]
    close(both, two + alone, 1e-12)


@pytest.mark.parametrize("mode", ["constrained", "iterative"])
def test_a_range_below_the_feature_does_nothing(mode: str):
    """Maths 15.11."""
    done = patched("clt", {source("clt", layer=2): 5.0}, (0, 1), mode=mode)
    close(done.taps.mid_TD, clean_stream("clt"), 1e-13)


def test_a_plt_patched_in_its_own_layer_is_steering():
    """Maths 15.12: constrained on [l, l] is adding the decoder row to the real MLP."""
    s = source("plt")
    clamped = patched("plt", {s: 0.0}, (1, 1), norms="live")
    steered = patched("plt", {s: 0.0}, (0, L - 1), mode="additive")
    close(clamped.out_TD, steered.out_TD, 1e-13)
    assert np.abs(np.asarray(clamped.taps.mid_TD) - clean_stream("plt")).max() > 1e-3


def test_additive_counts_a_cross_layer_feature_twice():
    """Its writes are added to MLPs that respond to its first write already."""
    s = source("clt")
    clamped = patched("clt", {s: 0.0}, (1, L - 1))
    steered = patched("clt", {s: 0.0}, (0, L - 1), mode="additive")
    assert np.abs(clamped.out_TD - steered.out_TD).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_iterative_in_one_layer_is_constrained(name: str):
    """Maths 15.13: a feature cannot affect its own layer."""
    s = source(name)
    one = patched(name, {s: -1.0}, (1, 1), mode="iterative")
    close(one.out_TD, patched(name, {s: -1.0}, (1, 1)).out_TD, 1e-13)


@pytest.mark.parametrize("name", [*CASES, "gemma3", "neox", GPT2])
@pytest.mark.parametrize("gates", ["live", "frozen"])
def test_the_slope_of_iterative_patching_is_the_total_effect(name: str, gates: str):
    """Maths 15.14: range all, norms frozen; gates live or not, none flips so close."""
    graph, s, h = case_graph(name), source(name, layer=0), 1e-5
    up, down = (
        effect(
            name,
            patched(
                name, {s: 1 + d}, (0, L - 1), mode="iterative", norms="frozen",
                gates=gates,
            ),
        ).logit_K
        for d in (h, -h)
    )  # fmt: skip
    want = solve_total_effect(graph)[:, s]
    assert np.abs(want - graph.edge_RN[graph.target_rows, s]).max() > 1e-6
    close((up - down) / (2 * h), want, 1e-7)


def test_silent_features_may_switch_on_unless_gates_are_frozen():
    """Maths 15.15: with gates frozen the result is affine in any factor."""
    a, s = case_active("clt"), source("clt", layer=0)

    def logits(M: float, gates: str) -> np.ndarray:
        done = patched(
            "clt", {s: M}, (0, L - 1), mode="iterative", norms="frozen", gates=gates
        )
        return np.asarray(effect("clt", done).logit_K)

    frozen = [logits(M, "frozen") for M in (-6.0, 1.0, 8.0)]
    close(frozen[0] + frozen[2], 2 * frozen[1], 1e-11)
    live = [logits(M, "live") for M in (-6.0, 1.0, 8.0)]
    assert np.abs(live[0] + live[2] - 2 * live[1]).max() > 1e-3
    # ... because a feature that was silent fires.
    done = patched("clt", {s: 8.0}, (0, L - 1), mode="iterative", norms="frozen")
    fired = set(
        zip(a.layer_A.tolist(), a.pos_A.tolist(), a.feature_A.tolist(), strict=True)
    )
    every = np.stack(np.meshgrid(range(L), range(6), range(20), indexing="ij"), -1)
    silent = np.array(
        [n for n in every.reshape(-1, 3).tolist() if tuple(n) not in fired]
    )
    watch = gather_features(case("clt").dictionary, model("clt"), silent)
    assert not np.asarray(watch.value_E).any()
    assert np.asarray(watch_values(model("clt"), done, watch)).any()


@pytest.mark.parametrize("mode", ["constrained", "iterative", "additive"])
def test_set_and_add_are_scales_in_other_words(mode: str):
    """For a feature whose own activation the patch does not move."""
    a, s = case_active("clt"), source("clt")
    value = float(a.value_A[s])
    layers = (1, 2)
    want = patched("clt", {s: 3.0}, layers, mode=mode).out_TD
    for op, number in (("set", 3 * value), ("add", 2 * value)):
        got = patched("clt", {s: number}, layers, mode=mode, op=op).out_TD
        close(got, want, 1e-12)


def test_live_patterns_answer_too():
    s = source("clt")
    one, other = (
        patched("clt", {s: -3.0}, (1, 1), patterns=held) for held in ("frozen", "live")
    )
    assert np.abs(one.out_TD - other.out_TD).max() > 1e-4


@functools.cache
def neurons(k: int | None, name: str = "clt") -> tuple[Any, Any, Any]:
    with jax.enable_x64(True):
        t = case(name)
        dictionary = NeuronDictionary(k)
        active = active_features(dictionary, t.params, t.recording, t.cfg)
        graph = attribute_recording(
            Prompt(
                t.params,
                t.recording,
                active,
                t.targets,
                cfg=t.cfg,
                config=AttributeConfig(max_features=None, tolerance=0.0),
            ),
            t.meta,
        )
        return dictionary, active, graph


def neuron_patch(
    k: int | None, s: int, M: float, layers: Any, name: str = "clt", **how: Any
) -> Effect:
    t = case(name)
    dictionary, a, _ = neurons(k, name)
    patchable = make_patchable(dictionary, t.params, t.recording, t.cfg)
    node = (int(a.layer_A[s]), int(a.pos_A[s]), int(a.feature_A[s]))
    change = Change.of(gather_features(dictionary, patchable, [node]), M)
    tables = None
    if how.get("mode") == "iterative":
        own = make_local(dictionary, patchable, a)
        change, tables = own.placed(change), own.tables
    range_2 = jnp.asarray(layers, jnp.int32)
    done = run_jit(patchable, change, range_2, How(**how), tables)
    return measure_effect(
        patchable, done, Ask(t.targets.token_K, jnp.asarray(5, jnp.int32))
    )


@pytest.mark.parametrize("name", ["clt", *NORMS_BEHIND, "neox", GPT2])
def test_a_neuron_with_its_gate_frozen_has_the_graphs_total_effect(name: str):
    """Maths 15.14 for `neurons:k`: affine, so at any size."""
    _, _, graph = neurons(6, name)
    s = int(np.argmax(np.abs(solve_total_effect(graph)[:, : graph.n_features]).sum(0)))
    got = neuron_patch(
        6, s, -2.0, (0, L - 1), name, mode="iterative", norms="frozen", gates="frozen"
    ).logit_K
    want = -3 * solve_total_effect(graph)[:, s]
    close(got - graph.readout_R[graph.target_rows], want, 1e-11)


@pytest.mark.parametrize("name", ["clt", *NORMS_BEHIND, "neox", GPT2])
def test_with_all_neurons_and_live_gates_the_replacement_is_the_model(name: str):
    """Iterative with live gates equals the additive ablation exactly, with live norms
    as well where none is behind the MLPs: that one is part of a neuron."""
    _, a, _ = neurons(None, name)
    last = np.flatnonzero((a.layer_A == 0) & (a.pos_A == 5))
    s = int(last[np.abs(a.value_A[last]).argmax()])
    norm = "frozen" if name in NORMS_BEHIND else "live"
    every = (None, s, 0.0, (0, L - 1), name)
    local = neuron_patch(*every, mode="iterative", gates="live", norms=norm)
    real = neuron_patch(*every, mode="additive", norms=norm)
    close(local.logit_K, real.logit_K, 1e-12)
    assert float(real.kl) > 1e-6


@pytest.mark.parametrize("name", ["clt", "gpt2"])
def test_generation_token_by_token_is_the_patch_of_the_whole_text(name: str):
    """Maths 15.18: keys and values of patched positions stand in for the positions."""
    t, a, n = case(name), case_active(name), 5
    s, T = source(name), len(t.token_T)
    layer, feature = int(a.layer_A[s]), int(a.feature_A[s])
    how = How(mode="additive", patterns="live")
    range_2 = jnp.asarray((0, L - 1), jnp.int32)

    def held(positions: range, of: Patchable) -> Change:
        places = [(layer, p, feature) for p in positions]
        return Change.of(gather_features(t.dictionary, of, places), 0.0, 40.0)

    done = run_jit(model(name), held(range(2, T), model(name)), range_2, how)
    later = held(range(T, T + n), model(name))
    rest = (range_2, jax.random.key(0), jnp.float32(0))
    new = continue_prompt(model(name), done, later, *rest, n_new=n)
    clean = continue_prompt(model(name), done, None, *rest, n_new=n)
    assert new[0] == clean[0]
    assert new.tolist() != clean.tolist()

    text = jnp.concatenate([t.token_T, new])
    recording = jax.jit(record, static_argnames="cfg")(t.params, text, cfg=t.cfg)
    whole = make_patchable(t.dictionary, t.params, recording, t.cfg)
    done = run_jit(whole, held(range(2, T + n), whole), range_2, how)
    logit_TV = unembed(t.params, done.out_TD[T - 1 : -1])
    assert new.tolist() == jnp.argmax(logit_TV, -1).tolist()


@pytest.mark.parametrize(
    "name", ["topk", pytest.param("gemma2", marks=pytest.mark.slow)]
)
def test_new_tokens_are_patched_where_the_feature_fires_on_them(name: str):
    """Where features compete, by all of the new position; neurons behind a norm by its
    scale there. In the first layer, which no earlier edit reaches."""
    t, n = case(name), 5
    T, own = len(t.token_T), t.dictionary if name == "topk" else NeuronDictionary(None)
    how = How(mode="additive", patterns="live")
    range_2 = jnp.asarray((0, L - 1), jnp.int32)
    rest = (range_2, jax.random.key(0), jnp.float32(0))

    def patched_text(recording: Any, places: Any, M: float) -> tuple[Any, Change, Run]:
        whole = make_patchable(own, t.params, recording, t.cfg)
        change = Change.of(gather_features(own, whole, places), M)
        return whole, change, run_jit(whole, change, range_2, how)

    prompt, _, done = patched_text(t.recording, [(0, 0, 0)], 1.0)
    clean = continue_prompt(prompt, done, None, *rest, n_new=n)
    for feature in range(20):
        places = [(0, p, feature) for p in range(T, T + n)]
        later = Change.of(gather_features(own, prompt, places), -50.0)
        among = rivals(own, prompt, later)
        new = continue_prompt(prompt, done, later, *rest, n_new=n, among=among)
        if new.tolist() != clean.tolist():
            break
    else:
        pytest.fail("no feature of the first 20 fires on new tokens")
    text = jnp.concatenate([t.token_T, new])
    recording = jax.jit(record, static_argnames="cfg")(t.params, text, cfg=t.cfg)
    _, change, done = patched_text(recording, places, -50.0)
    logit_TV = unembed(t.params, done.out_TD[T - 1 : -1])
    assert new.tolist() == jnp.argmax(logit_TV, -1).tolist()
    if name == "topk":  # some of both, which the last prompt position does not tell
        assert 0 < np.count_nonzero(change.features.value_E) < n
