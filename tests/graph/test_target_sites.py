"""Targets of every kind: rows that sum, finite differences of any size, weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, case_active, case_local, case_lrm, close
from jax import Array

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.errors import InputError
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.certificate import certificate
from jaxclt.graph.graph import Graph
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.prune import restrict
from jaxclt.graph.scores import scores
from jaxclt.graph.targets import (
    SITES,
    combine_targets,
    difference_targets,
    feature_targets,
    functional_targets,
    probability_targets,
    salient_targets,
    token_targets,
)
from jaxclt.lm.run import unembed
from jaxclt.replacement.local import run_local
from jaxclt.testing import Tiny
from jaxclt.types import Targets

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ("clt", "plt", "skip", "topk", "neox")
LAYER, POS = 2, 3  # of four layers and six positions
INACTIVE = {name: (1, 4) for name in NAMES}  # layer, position


def vector(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), shape, jnp.float64))


def held(t: Tiny, run: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each site holds [..., D] at (LAYER, POS), from a run; leading axes kept."""
    frozen, blocks = t.recording.frozen, t.params.blocks
    mid, write = run["mid"][..., LAYER, POS, :], run["write"][..., LAYER, POS, :]
    pre = leaving(t, run, LAYER - 1)[..., POS, :]
    scale = np.asarray(frozen.mlp_scale_LT)[LAYER, POS]
    attn_scale = np.asarray(frozen.attn_scale_LT)[LAYER, POS]

    def centred(x: np.ndarray) -> np.ndarray:
        layer_norm = blocks.norm_mlp_bias_LD is not None
        return x - layer_norm * x.mean(-1, keepdims=True)

    def weighed(x: np.ndarray, gain_LD: Array, bias_LD: Array | None) -> np.ndarray:
        out = centred(x) * np.asarray(gain_LD)[LAYER]
        return out if bias_LD is None else out + np.asarray(bias_LD)[LAYER]

    return {
        "out": run["out"][..., POS, :],
        "resid_mid": mid,
        "normalized": centred(mid) * scale,
        "mlp_in": weighed(mid * scale, blocks.norm_mlp_LD, blocks.norm_mlp_bias_LD),
        "mlp_out": write,
        "resid_post": leaving(t, run, LAYER)[..., POS, :],
        "resid_pre": pre,
        "attn_in": weighed(
            pre * attn_scale, blocks.norm_attn_LD, blocks.norm_attn_bias_LD
        ),
    }


def leaving(t: Tiny, run: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """The stream behind a layer, [..., T, D]."""
    if t.cfg.parallel:
        return run["mid"][..., layer + 1, :, :]
    return (run["mid"] + run["write"])[..., layer, :, :]


def last_leaving(t: Tiny) -> int:
    """The last layer behind which the stream can be read."""
    return t.cfg.n_layers - 1 - t.cfg.parallel


def site(name: str) -> str:
    return name if name == "out" else f"{name}:{LAYER}"


def inactive_place(name: str) -> tuple[int, int, int]:
    """A feature that does not fire."""
    layer, pos = INACTIVE[name]
    return layer, pos, int(np.flatnonzero(case_local(name).a_LTF[layer, pos] == 0)[0])


def active_place(name: str) -> tuple[int, int, int]:
    a = case_active(name)
    at = np.flatnonzero((a.layer_A == LAYER) & (a.pos_A == POS))[0]
    return LAYER, POS, int(a.feature_A[at])


@functools.cache
def all_targets(name: str) -> Targets:
    """One of every kind, with weights of both signs."""
    t = case(name)
    args, out_TD = (t.params, t.recording), t.recording.out_TD
    token = jnp.array([3, 17], jnp.int32)
    D = t.cfg.d_model
    parts = [
        functional_targets(
            *args, site(s), POS, vector(i, (2, D)), cfg=t.cfg, const_K=[0.7, -2.0]
        )
        for i, s in enumerate(SITES)
    ]
    parts += [
        salient_targets(t.params, out_TD[-1], most=3),
        token_targets(t.params, out_TD[POS], token, pos=POS),
        difference_targets(t.params, token[:1], token[1:]),
        probability_targets(t.params, out_TD[1], token, pos=1),
        probability_targets(t.params, out_TD[-1], token, log=True),
        feature_targets(
            t.dictionary,
            *args,
            [active_place(name), inactive_place(name)],
            cfg=t.cfg,
        ),
        functional_targets(
            *args, f"resid_post:{last_leaving(t)}", -1, np.ones(D), cfg=t.cfg
        ),
        functional_targets(*args, "mlp_out:0", 0, np.ones(D), cfg=t.cfg),
    ]
    weights = [(-1.0) ** i * (i + 1) for i in range(len(parts))]
    return combine_targets(parts, weights)


@functools.cache
def graph_of(name: str) -> Graph:
    return dataclasses.replace(case(name), targets=all_targets(name)).graph()


def exact_runs(name: str, factor: float) -> dict[str, np.ndarray]:
    """Reads of the local replacement model, source n multiplied in entry n."""
    graph, lrm, t = graph_of(name), case_lrm(name), case(name)
    clean = (lrm.embed_TD, lrm.error_LTD, case_local(name).a_LTF)
    embed, error, a = (
        np.broadcast_to(np.asarray(x), (graph.edge_RN.shape[1], *x.shape)).copy()
        for x in clean
    )
    n_A = np.arange(graph.n_features)
    a[n_A, graph.layer_A, graph.pos_A, graph.feature_A] *= factor
    error_n = np.arange(graph.error_cols.start, graph.error_cols.stop)
    layer, pos = np.divmod(error_n - graph.n_features, graph.n_tokens)
    error[error_n, layer, pos] *= factor
    pos = np.arange(graph.n_tokens)
    embed[graph.embed_cols.start + pos, pos] *= factor

    @jax.jit
    @jax.vmap
    def run(embed_TD: jax.Array, error_LTD: jax.Array, a_LTF: jax.Array):
        return run_local(lrm, embed_TD=embed_TD, error_LTD=error_LTD, a_LTF=a_LTF)

    done = run(embed, error, a)
    # What MLPs' places add, computed from the sources, not through the stream.
    write = np.repeat(np.asarray(t.clt.b_dec_LD)[:, None], graph.n_tokens, 1) + error
    for source, W_FMD in enumerate(map(np.asarray, t.clt.W_dec)):
        for offset in range(W_FMD.shape[1]):
            write[:, source + offset] += a[:, source] @ W_FMD[:, offset]
    mid = np.asarray(done.mid_LTD)
    if t.clt.W_skip_LDD is not None:
        write += np.asarray(jax.vmap(lrm.reads)(mid)) @ np.asarray(t.clt.W_skip_LDD)
    return {"mid": mid, "write": write, "out": np.asarray(done.out_TD)} | {
        "pre": np.asarray(done.pre_LTF)
    }


def wanted_readouts(name: str, run: dict[str, np.ndarray]) -> np.ndarray:
    """What `all_targets` read in a run, [..., K], without the code under test."""
    t, D = case(name), case(name).cfg.d_model
    clean_TV = np.asarray(unembed(t.params, t.recording.out_TD))
    prob_TV = np.asarray(jax.nn.softmax(clean_TV))
    logit = np.asarray(unembed(t.params, run["out"]))
    demeaned = logit - logit.mean(-1, keepdims=True)
    at = held(t, run)
    parts = [
        at[s] @ vector(i, (2, D)).T + np.array([0.7, -2.0]) for i, s in enumerate(SITES)
    ]
    top = np.argsort(-prob_TV[-1], kind="stable")[:3]
    centred = logit - (logit * prob_TV).sum(-1, keepdims=True)
    parts += [
        demeaned[..., -1, top],
        demeaned[..., POS, [3, 17]],
        logit[..., -1, [3]] - logit[..., -1, [17]],
        prob_TV[1, [3, 17]] * centred[..., 1, [3, 17]],
        centred[..., -1, [3, 17]],
        np.stack(
            [
                run["pre"][(..., *active_place(name))],
                run["pre"][(..., *inactive_place(name))],
            ],
            -1,
        ),
        leaving(t, run, last_leaving(t))[..., -1, :].sum(-1, keepdims=True),
        run["write"][..., 0, 0, :].sum(-1, keepdims=True),
    ]
    signed = [part * (-1.0) ** i for i, part in enumerate(parts)]
    return np.concatenate(signed, -1)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_kind_sum_to_the_functional(name: str) -> None:
    """Maths 6.3 at 1e-12: edges + bias + rest = the functional of the clean run."""
    graph, local = graph_of(name), case_local(name)
    total_R = graph.edge_RN.sum(1) + graph.bias_R + graph.rest_R
    close(total_R, graph.readout_R, 1e-12)
    assert certificate(graph).max_relative_row_error < 1e-13
    clean = {
        "mid": np.asarray(local.mid_LTD),
        "write": np.asarray(case(name).recording.write_LTD),
        "out": np.asarray(local.out_TD),
        "pre": np.asarray(local.pre_LTF),
    }
    close(graph.readout_R[graph.target_rows], wanted_readouts(name, clean), 1e-12)


@pytest.mark.parametrize("name", ["clt", "skip", "neox"])
def test_an_edge_into_any_functional_predicts_a_change_of_any_size(name: str) -> None:
    """Maths 6.6: every feature, error and embedding times -7, every target."""
    graph = graph_of(name)
    changed_NK = wanted_readouts(name, exact_runs(name, -7.0))
    readout_K = graph.readout_R[graph.target_rows]
    effect_KN = (changed_NK - readout_K[None]).T / -8.0
    close(graph.edge_RN[graph.target_rows], effect_KN, 1e-12)


@pytest.mark.parametrize("name", ["clt", "skip"])
def test_the_bias_of_a_target_is_the_run_without_sources(name: str) -> None:
    """Maths 6.4."""
    lrm, t = case_lrm(name), case(name)
    zero = [jnp.zeros_like(x) for x in (lrm.embed_TD, lrm.error_LTD)]
    a_LTF = jnp.zeros_like(case_local(name).a_LTF)
    run = jax.jit(run_local)(lrm, embed_TD=zero[0], error_LTD=zero[1], a_LTF=a_LTF)
    mid = np.asarray(run.mid_LTD)
    write = np.repeat(np.asarray(t.clt.b_dec_LD)[:, None], mid.shape[1], 1)
    if t.clt.W_skip_LDD is not None:
        write += np.asarray(lrm.reads(mid)) @ np.asarray(t.clt.W_skip_LDD)
    done = {"mid": mid, "write": write, "out": np.asarray(run.out_TD)}
    want = wanted_readouts(name, done | {"pre": np.asarray(run.pre_LTF)})
    close(graph_of(name).bias_R[graph_of(name).target_rows], want, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_later_is_a_source(name: str) -> None:
    """Maths 6.7: exact zeros above the layer read and beyond the position."""
    graph, targets = graph_of(name), all_targets(name)
    L, T = graph.n_layers, graph.n_tokens
    layer_N = np.r_[graph.layer_A, np.repeat(np.arange(L), T), np.full(T, -1)]
    pos_N = np.r_[graph.pos_A, np.tile(np.arange(T), L), np.arange(T)]
    reads_write = np.asarray(targets.write_KD).any(1)
    top_K = graph.target_layer_K + reads_write  # sources lie below
    pos_K = graph.target_pos_K
    assert set(pos_K.tolist()) == {0, 1, POS, 4, T - 1}
    edge_KN = graph.edge_RN[graph.target_rows]
    later = (layer_N >= top_K[:, None]) | (pos_N > pos_K[:, None])
    assert (edge_KN[later] == 0).all()
    # The MLP of layer l at an earlier position is too late for attention of layer l.
    stuck = (layer_N >= top_K[:, None] - 1) & (pos_N < pos_K[:, None])
    assert (edge_KN[stuck & reads_write[:, None]] == 0).all()
    assert edge_KN.any(1).all()


def test_an_active_feature_as_a_target_has_the_row_of_its_node() -> None:
    """Both rows exist; a feature that does not fire needs none."""
    t, graph = case("clt"), graph_of("clt")
    place = np.stack([graph.layer_A, graph.pos_A, graph.feature_A], 1)
    (node,) = np.flatnonzero((place == active_place("clt")).all(1))
    assert not (place == inactive_place("clt")).all(1).any()
    args = (t.dictionary, t.params, t.recording, active_place("clt"))
    got = dataclasses.replace(t, targets=feature_targets(*args, cfg=t.cfg)).graph()
    target = got.target_rows.start
    np.testing.assert_array_equal(place[node], active_place("clt"))
    for array in (got.edge_RN, got.bias_R, got.readout_R):
        close(array[target], array[node], 1e-13)
    assert got.meta.target_tokens == (f"L{LAYER} feature {place[node, 2]}",)


def test_a_neuron_as_a_target() -> None:
    """Its gate frozen, chosen by `neurons:k` or not: the readout is its activation."""
    t, neurons = case("clt"), NeuronDictionary(3)
    every = active_features(NeuronDictionary(), t.params, t.recording, t.cfg)
    at = np.array([5, 200, 333])
    place_K3 = np.stack([every.layer_A, every.pos_A, every.feature_A], 1)[at]
    targets = feature_targets(neurons, t.params, t.recording, place_K3, cfg=t.cfg)
    graph = attribute_recording(
        Prompt(
            t.params,
            t.recording,
            active_features(neurons, t.params, t.recording, t.cfg),
            targets,
            cfg=t.cfg,
            config=AttributeConfig(max_features=None),
        ),
        t.meta,
    )
    close(graph.readout_R[graph.target_rows], every.value_A[at], 1e-12)
    assert certificate(graph).max_relative_row_error < 1e-13


@pytest.mark.parametrize("convention", ["paper", "circuit-tracer"])
def test_rows_sum_with_few_features_and_after_pruning(convention: str) -> None:
    t = dataclasses.replace(case("skip"), targets=all_targets("skip"))
    config = AttributeConfig(max_features=40, convention=convention, chunk_size=32)
    small = t.graph(config)
    for graph in (small, restrict(small)):
        total_R = graph.edge_RN.sum(1) + graph.bias_R + graph.rest_R
        close(total_R, graph.readout_R, 1e-12)
    whole = graph_of("skip")
    close(small.readout_R[small.target_rows], whole.readout_R[whole.target_rows])
    assert small.rest_R[small.target_rows].any()
    # The model's derivative is that of a node, whatever others there are.
    assert small.derivative_KN is not None
    assert whole.derivative_KN is not None
    place = [list(map(g.feature, range(g.n_features))) for g in (small, whole)]
    there = [place[1].index(at) for at in place[0]]
    derivative_KA = small.derivative_KN[:, small.feature_cols]
    close(derivative_KA, whole.derivative_KN[:, there], 1e-12)
    at_first = small.derivative_KN[:, small.error_cols.start]
    assert at_first.any() == (convention == "paper")


def test_weights_are_shares_and_their_signs_turn_targets_round() -> None:
    """Influence counts sizes, effects have the sign: -2 f is 2 (-f)."""
    t = case("clt")
    one = functional_targets(
        t.params, t.recording, "resid_mid:1", 2, vector(1, (16,)), cfg=t.cfg
    )
    two = salient_targets(t.params, t.recording.out_TD[-1])
    both = combine_targets([one, two], [-1.0, 3.0])
    close(both.weight_K[0], np.float64(0.25))
    close(both.weight_K[1:], 0.75 * two.weight_K / two.weight_K.sum())
    close(both.vec_KD[0], -np.asarray(one.vec_KD[0]))
    assert both.labels[0] == "−(resid_mid:1)"
    assert both.token_K[1:].tolist() == two.token_K.tolist()
    plus = combine_targets([one, two], [1.0, 3.0])
    got, want = (
        dataclasses.replace(t, targets=targets).graph() for targets in (both, plus)
    )
    np.testing.assert_array_equal(got.influence_N, want.influence_N)
    np.testing.assert_array_equal(scores(got), scores(want))
    close(got.edge_RN[got.n_features], -want.edge_RN[got.n_features])
    close(got.bias_R[got.n_features], -want.bias_R[got.n_features])


def test_influence_is_the_weighted_sum_over_the_targets() -> None:
    t = case("clt")
    parts = [
        functional_targets(t.params, t.recording, s, POS, vector(7, (16,)), cfg=t.cfg)
        for s in ("resid_pre:1", "out")
    ]
    alone = [dataclasses.replace(t, targets=part).graph() for part in parts]
    combined = combine_targets(parts, [1, 4])
    got = dataclasses.replace(t, targets=combined).graph()
    want = 0.2 * alone[0].influence_N + 0.8 * alone[1].influence_N
    close(got.influence_N, want, 1e-13)


def test_padding_does_not_move_targets() -> None:
    """Negative positions count from the end of the prompt, not of the recording."""
    t, n = case("clt"), 4
    part = token_targets(t.params, t.recording.out_TD[n - 1], jnp.array([3]))
    graph = attribute_recording(
        Prompt(t.params, t.recording, t.active, part, cfg=t.cfg, n_tokens=n), t.meta
    )
    assert graph.target_pos_K.tolist() == [n - 1]
    logit_V = np.asarray(unembed(t.params, t.recording.out_TD))[n - 1]
    close(graph.readout_R[-1], logit_V[3] - logit_V.mean(), 1e-12)
    assert certificate(graph).max_relative_row_error < 1e-13


def functional(*args: object, **more: object) -> Callable[[Tiny], object]:
    return lambda t: functional_targets(
        t.params,
        t.recording,
        *args,  # pyright: ignore
        cfg=t.cfg,
        **more,  # pyright: ignore
    )


def behind_the_last(_: Tiny) -> object:
    """Where attention and MLP stand side by side."""
    return functional("resid_post:3", 0, ONES)(case("neox"))


def features(*place: int) -> Callable[[Tiny], object]:
    return lambda t: feature_targets(
        t.dictionary, t.params, t.recording, place, cfg=t.cfg
    )


def attributed(**changes: object) -> Callable[[Tiny], object]:
    return lambda t: dataclasses.replace(
        t, targets=dataclasses.replace(t.targets, **changes)
    ).graph()


ONES = np.ones(16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functional("resid", 0, ONES), "unknown: write out, or one of"),
        (functional("out:3", 0, ONES), "unknown: write out, or one of"),
        (functional("resid_mid:4", 0, ONES), "the model has layers 0 to 3"),
        (functional("attn_in:0", 0, ONES), "name a later layer"),
        (behind_the_last, "nothing but the output reads both, use out"),
        (functional("out", 6, ONES), "the prompt has 6 tokens"),
        (functional("out", -7, ONES), "the prompt has 6 tokens"),
        (functional("out", 0, np.ones(15)), "this model needs"),
        (functional("out", 0, ONES, labels=["a", "b"]), "need 1 labels"),
        (features(4, 0, 0), "no layer 4: give one from 0 to 3"),
        (features(0, 6, 0), "the prompt has 6 tokens"),
        (features(0, 0, 20), "no feature 20: give one from 0 to 19"),
        (lambda t: combine_targets([]), "give one each"),
        (lambda t: combine_targets([t.targets], [1, 2]), "give one each"),
        (lambda t: combine_targets([t.targets], [0]), "other than 0"),
        (attributed(weight_K=-jnp.ones(10)), "must not be negative"),
        (attributed(weight_K=jnp.zeros(10)), "not all be zero"),
        (attributed(pos_K=jnp.full(10, 6)), "the prompt has 6 tokens"),
        (attributed(layer_K=jnp.full(10, 5)), "layer is not among 0 to 4"),
        (attributed(vec_KD=jnp.full((10, 16), jnp.nan)), "vec_KD is not finite"),
        (attributed(write_KD=jnp.ones((10, 16))), "use site resid_post"),
    ],
)  # fmt: skip
def test_a_target_that_does_not_fit_is_refused(
    make: Callable[[Tiny], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(case("clt"))
