"""Edges by response and their parts, against jax's derivative of the model's own run.

The oracle runs the model with every write given: attention, norms and the rows' own
gates are live, other features held.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FAMILY_CASES, case, close, column_writes, pulled_rows
from jax import Array

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Dictionary, Loaded, load
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.clt.sites import read_site
from jaxclt.errors import InputError
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.effects import solve_total_effect
from jaxclt.graph.graph import Graph
from jaxclt.graph.live import live_way
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.response import by_response
from jaxclt.graph.response_table import PARTS
from jaxclt.graph.targets import (
    combine_targets,
    feature_targets,
    functional_targets,
    token_targets,
)
from jaxclt.lm import layers
from jaxclt.lm.frozen import frozen_reads
from jaxclt.lm.run import Policy, native_mlp, record, run
from jaxclt.testing import Tiny
from jaxclt.types import Added, Held, Sources

pytestmark = pytest.mark.usefixtures("x64")

# Both kinds of dictionary on the models with all switches; the others with `-m slow`.
QUICK = (("skip", False), ("gemma3", True), ("neox", False))
EVERY = [
    (name, neurons)
    if (name, neurons) in QUICK
    else pytest.param(name, neurons, marks=pytest.mark.slow)
    for name, neurons in [
        *((name, False) for name in (*CASES, *FAMILY_CASES)),
        *((name, True) for name in ("clt", *FAMILY_CASES)),
    ]
]
SITES = (("mlp_in:2", 3), ("attn_in:3", 4), ("normalized:1", 2), ("mlp_out:2", 4))
SITES += (("resid_post:1", 3), ("out", 1))
EVERYTHING = AttributeConfig(
    max_features=None, tolerance=0.0, devices=1, response=True, edge_threshold=1.0
)


class Asked(NamedTuple):
    """A tiny model with a dictionary, and what is explained."""

    t: Tiny
    dictionary: Dictionary
    loaded: Loaded
    active: Active
    place_3: tuple[int, int, int]  # of a feature that is a target, too
    vec_SD: np.ndarray  # directions at `SITES`


@functools.cache
def asked(name: str, neurons: bool) -> Asked:
    t = case(name)
    dictionary = NeuronDictionary() if neurons else t.dictionary
    active = active_features(dictionary, t.params, t.recording, t.cfg)
    at = len(active.layer_A) * 2 // 3
    place = active.layer_A[at], active.pos_A[at], active.feature_A[at]
    vec_SD = np.asarray(jax.random.normal(jax.random.key(3), (len(SITES), 16)))
    tokens = jnp.asarray([3, 8], jnp.int32)
    targets = [token_targets(t.params, t.recording.out_TD[-1], tokens)]
    targets += [
        functional_targets(t.params, t.recording, site, pos, vec_D, cfg=t.cfg)
        for (site, pos), vec_D in zip(SITES, vec_SD, strict=True)
    ]
    targets += [
        feature_targets(dictionary, t.params, t.recording, place, cfg=t.cfg),
    ]
    weights = [1.0] * (len(targets) - 1) + [-1.0]
    t = dataclasses.replace(t, targets=combine_targets(targets, weights))
    loaded = load(dictionary, t.params, t.cfg)
    return Asked(t, dictionary, loaded, active, tuple(map(int, place)), vec_SD)


@functools.cache
def graph(name: str, neurons: bool) -> Graph:
    a = asked(name, neurons)
    return a.t.graph(EVERYTHING, active=a.active, dictionary=a.dictionary)


def rows_of_run(
    a: Asked, change_STD: Array, added: Added | None, held: Held
) -> tuple[Array, Array]:
    """What all rows read in a run with every write given; and gates alone of it.

    Args:
      a: the model.
      change_STD: added to the embeddings, then to each layer's write.
      added: to queries and keys.
      held: of the run.
    """
    t, coder, weights = a.t, a.loaded.coder, a.loaded.weights
    every = range(t.cfg.n_layers)
    blocks = [jax.tree.map(lambda x, l=l: x[l], t.params.blocks) for l in every]
    encs = [jax.tree.map(lambda x, l=l: x[l], weights.enc) for l in every]
    fixed = [jax.tree.map(lambda x, l=l: x[l], weights.fixed) for l in every]
    skips = [coder.skip(x) for x in fixed]

    def skip_write(l: int, mid_TD: Array, scale_T: Array) -> Array | float:
        if skips[l] is None:
            return 0.0
        read_TD = read_site(coder.site, layers.mlp_norm(blocks[l]), mid_TD, scale_T)
        return read_TD @ skips[l]

    rec, scale_LT = t.recording, t.recording.frozen.mlp_scale_LT
    given = [
        rec.write_LTD[l] - skip_write(l, rec.mid_LTD[l], scale_LT[l]) for l in every
    ]
    stacked = None if skips[0] is None else jnp.stack(skips)  # pyright: ignore

    def write(carry: None, mid_TD: Array, scale_T: Array, p: Any, x: Any) -> tuple:
        given_TD, skip_DD = x
        if skip_DD is not None:
            read_TD = read_site(coder.site, layers.mlp_norm(p), mid_TD, scale_T)
            given_TD = given_TD + read_TD @ skip_DD
        return carry, given_TD

    data = jnp.stack(given) + change_STD[1:], stacked
    done = run(
        t.params,
        rec.embed_TD + change_STD[0],
        Policy(write, None, data),
        cfg=t.cfg,
        frozen=dataclasses.replace(held, added=added),
    )
    taps, pre = done.taps, []
    for l in every:
        norm = layers.mlp_norm(blocks[l])
        read_TD = read_site(coder.site, norm, taps.mid_TD[l], taps.mlp_scale_T[l])
        pre.append(coder.encode(blocks[l], encs[l], read_TD).pre_TF)
    pre_LTF = jnp.stack(pre)
    value = [pre_LTF[a.active.layer_A, a.active.pos_A, a.active.feature_A]]
    value.append(done.out_TD[-1] @ jnp.asarray(t.targets.vec_KD[:2]).T)
    value += [site_value(a, done, site, pos)[None] for site, pos in SITES]
    value.append(-pre_LTF[a.place_3][None])
    return jnp.concatenate(value), taps.mid_TD


def site_value(a: Asked, done: Any, site: str, pos: int) -> Array:
    """A direction at a site of a run, everything live."""
    t, (name, _, layer) = a.t, site.partition(":")
    vec_D, taps, l = a.vec_SD[SITES.index((site, pos))], done.taps, int(layer or 0)
    p = jax.tree.map(lambda x: x[l], t.params.blocks)
    match name:
        case "out":
            x_TD = done.out_TD
        case "mlp_out":
            x_TD = taps.write_TD[l]
        case "resid_post":
            x_TD = taps.resid_TD[l + 1]
        case "attn_in":
            norm = layers.attn_norm(p)
            x_TD = layers.normalise(taps.resid_TD[l], taps.attn_scale_T[l], norm)
        case "mlp_in":
            norm = layers.mlp_norm(p)
            x_TD = layers.normalise(taps.mid_TD[l], taps.mlp_scale_T[l], norm)
        case _:
            x_TD = layers.centre(taps.mid_TD[l], layers.mlp_norm(p))
            x_TD = x_TD * taps.mlp_scale_T[l][:, None]
    return x_TD[pos] @ vec_D


@functools.cache
def changes(name: str, neurons: bool) -> Array:
    """What every column writes, [N, 1 + L, T, D]."""
    a = asked(name, neurons)
    return jnp.asarray(column_writes(a.t, a.active, neurons=neurons))


def along(f: Any, at: Any, directions: Any) -> tuple[Array, ...]:
    """Derivatives of f along some directions, the first axis of their leaves."""
    tangent = jax.linearize(f, *at)[1]
    return jax.lax.map(lambda direction: tangent(*direction), directions)


@functools.cache
def derivative(name: str, neurons: bool, held: bool) -> np.ndarray:
    """Of all rows along all columns, [R, N]."""
    a = asked(name, neurons)
    frozen = a.t.recording.frozen
    scales = Held(
        attn_scale_LT=frozen.attn_scale_LT,
        mlp_scale_LT=frozen.mlp_scale_LT,
        out_scale_T=frozen.out_scale_T,
        post_attn_scale_LT=frozen.post_attn_scale_LT,
    )

    @jax.jit
    def found(change_NSTD: Array) -> Array:
        def rows(change_STD: Array) -> Array:
            return rows_of_run(a, change_STD, None, scales if held else Held())[0]

        return along(rows, (jnp.zeros_like(change_NSTD[0]),), (change_NSTD,))

    return np.asarray(found(changes(name, neurons))).T


@pytest.mark.parametrize(("name", "neurons"), EVERY)
def test_it_is_the_derivative_of_a_run_with_everything_else_given(
    name: str, neurons: bool
) -> None:
    """Maths 22.1."""
    got, want_RN = graph(name, neurons).response, derivative(name, neurons, False)
    assert got is not None
    assert np.abs(want_RN).max(1).all()
    close(got.edge_RN, want_RN, 1e-12)
    assert not got.rest_R.any()
    far = np.abs(want_RN - graph(name, neurons).edge_RN).max()
    assert far > 0.05 * np.abs(want_RN).max()  # not what frozen maps have


def arrives(a: Asked, change_STD: Array) -> tuple[Array, Array]:
    """A column in the frozen stream: entering each layer, and where MLPs read."""
    t, skip = a.t, a.active.skip
    embed_TD, write_LTD = change_STD[0], change_STD[1:]
    sources = Sources(embed_TD=embed_TD, write_LTD=write_LTD)
    frozen = t.recording.frozen
    mid_LTD = frozen_reads(t.params, frozen, sources, cfg=t.cfg, skip=skip).mid_LTD
    if t.cfg.parallel:
        return mid_LTD, mid_LTD
    if skip is not None:
        every = range(t.cfg.n_layers)
        write_LTD = write_LTD + jnp.stack(
            [skip.at(l, slice(None)).write(mid_LTD[l]) for l in every]
        )
    return jnp.concatenate([embed_TD[None], (mid_LTD + write_LTD)[:-1]]), mid_LTD


def asks(a: Asked, resid_LTD: Array) -> tuple[Array, Array]:
    """Queries and keys [L, T, H, C] of a stream, with all denominators as recorded."""
    t = a.t

    def of_layer(xs: tuple) -> tuple[Array, Array]:
        p, clean_TD, scale_T, resid_TD = xs
        norm = layers.attn_norm(p)
        clean_TD, resid_TD = (
            layers.normalise(x, scale_T, norm) for x in (clean_TD, resid_TD)
        )
        query_scale, key_scale = layers.head_scales(p, clean_TD, cfg=t.cfg)
        key_TGC = layers.keys(p, resid_TD, cfg=t.cfg, scale_TG=key_scale)
        key_THC = jnp.repeat(key_TGC, t.cfg.n_queries_per_kv, axis=1)
        return layers.queries(p, resid_TD, cfg=t.cfg, scale_TH=query_scale), key_THC

    rec = t.recording
    every = t.params.blocks, rec.resid_LTD, rec.frozen.attn_scale_LT, resid_LTD
    return jax.lax.map(of_layer, every)


def gates_alone(a: Asked, mid_LTD: Array) -> Array:
    """Activations of features [A] with their gates as they become, the rest recorded.

    That is, their linear parts; the norm before the MLP is live for what gates read.
    """
    t, loaded, values = a.t, a.loaded, []
    for l in range(t.cfg.n_layers):
        p, enc = jax.tree.map(
            lambda x, l=l: x[l], (t.params.blocks, loaded.weights.enc)
        )
        norm = layers.mlp_norm(p)

        def encoded(mid_TD: Array, p=p, enc=enc, norm=norm) -> Any:
            scale_T = layers.norm_scale(mid_TD, norm, eps=t.cfg.norm_eps)
            read_TD = read_site(loaded.coder.site, norm, mid_TD, scale_T)
            return loaded.coder.encode(p, enc, read_TD)

        now, clean = encoded(mid_LTD[l]), encoded(t.recording.mid_LTD[l])
        values.append(clean.linear_TF * (1.0 if now.gate_TF is None else now.gate_TF))
    return jnp.stack(values)[a.active.layer_A, a.active.pos_A, a.active.feature_A]


@pytest.mark.parametrize(("name", "neurons"), EVERY)
def test_parts_are_what_enters_a_query_a_key_or_a_gate_first(
    name: str, neurons: bool
) -> None:
    """Maths 22.4: by changing queries, keys or gates alone; all above is live."""
    a, g = asked(name, neurons), graph(name, neurons)
    clean_LTD = a.t.recording.resid_LTD

    @jax.jit
    def found(change_NSTD: Array) -> tuple[Array, ...]:
        none_STD = jnp.zeros_like(change_NSTD[0])

        def rows(query_LTHC: Array, key_LTHC: Array) -> Array:
            added = Added(query_LTHC=query_LTHC, key_LTHC=key_LTHC)
            return rows_of_run(a, none_STD, added, Held())[0]

        nothing = jax.tree.map(jnp.zeros_like, asks(a, clean_LTD))
        by_head = jax.linearize(rows, *nothing)[1]
        by_gate = jax.linearize(lambda x: gates_alone(a, x), a.t.recording.mid_LTD)[1]

        def one(change_STD: Array) -> tuple[Array, ...]:
            resid_LTD, mid_LTD = arrives(a, change_STD)
            query, key = jax.jvp(lambda x: asks(a, x), (clean_LTD,), (resid_LTD,))[1]
            by_query = by_head(query, jnp.zeros_like(key))
            return by_query, by_head(jnp.zeros_like(query), key), by_gate(mid_LTD)

        return jax.lax.map(one, change_NSTD)

    query_NR, key_NR, gate_NA = map(np.asarray, found(changes(name, neurons)))
    assert g.response is not None
    parts = g.response.parts
    at = parts.col_E, parts.row_E
    close(parts.query_E, query_NR[at], 1e-12)
    close(parts.key_E, key_NR[at], 1e-12)
    gate_NR = np.zeros_like(query_NR)
    gate_NR[:, : gate_NA.shape[1]] = gate_NA
    index = len(a.active.layer_A) * 2 // 3
    gate_NR[:, -1] = -gate_NA[:, index]
    assert gate_NA.any() == neurons
    np.testing.assert_allclose(
        parts.gate_E, gate_NR[at], rtol=0, atol=1e-12 * np.abs(query_NR).max()
    )


@pytest.mark.parametrize(("name", "neurons"), EVERY)
def test_parts_and_the_edge_by_value_sum_to_the_response(
    name: str, neurons: bool
) -> None:
    """Maths 22.4; every edge that either reading keeps has its parts."""
    g = graph(name, neurons)
    assert g.response is not None
    parts, edge_RN = g.response.parts, g.response.edge_RN
    at = parts.row_E, parts.col_E
    close(g.edge_RN[at] + parts.beside_value, edge_RN[at], 1e-12)
    keep_RN = np.zeros(edge_RN.shape, bool)
    keep_RN[at] = True
    either = g.pruning.keep_edge_RN | by_response(g).pruning.keep_edge_RN
    np.testing.assert_array_equal(keep_RN, either)


@pytest.mark.parametrize(("name", "neurons"), EVERY)
def test_with_all_neurons_totals_are_the_derivative_of_the_model(
    name: str, neurons: bool
) -> None:
    """Maths 22.5, 22.40; the model's own derivative for any dictionary."""
    a, g = asked(name, neurons), graph(name, neurons)
    t = a.t

    def write(
        carry: None, mid_TD: Array, scale_T: Array, p: Any, added: Array
    ) -> tuple:
        own_TD = native_mlp(t.cfg).write(carry, mid_TD, scale_T, p, None)[1]
        return carry, own_TD + added

    coder, (layer, pos, feature) = a.loaded.coder, a.place_3
    weights = t.params.blocks, a.loaded.weights.enc
    p, enc = jax.tree.map(lambda x: x[layer], weights)

    @jax.jit
    def slopes(change_NSTD: Array) -> Array:
        def targets(change_STD: Array) -> Array:
            embed_TD = t.recording.embed_TD + change_STD[0]
            done = run(
                t.params, embed_TD, Policy(write, None, change_STD[1:]), cfg=t.cfg
            )
            scale_T, mid_TD = done.taps.mlp_scale_T[layer], done.taps.mid_TD[layer]
            read_TD = read_site(coder.site, layers.mlp_norm(p), mid_TD, scale_T)
            pre = coder.encode(p, enc, read_TD).pre_TF[pos, feature]
            logit_K = done.out_TD[-1] @ jnp.asarray(t.targets.vec_KD[:2]).T
            sites = [site_value(a, done, site, at) for site, at in SITES]
            return jnp.concatenate([logit_K, jnp.stack([*sites, -pre])])

        return jax.lax.map(
            lambda k: jax.grad(lambda x: targets(x)[k])(jnp.zeros_like(change_NSTD[0])),
            jnp.arange(2 + len(SITES) + 1),
        )

    change = changes(name, neurons)
    slope = np.asarray(slopes(change)).reshape(len(g.target_token_K), -1)
    want_KN = slope @ np.asarray(change).reshape(len(change), -1).T
    close(g.derivative_KN, want_KN, 1e-12)
    if neurons:
        A = g.n_features
        close(solve_total_effect(by_response(g)), want_KN[:, :A], 1e-10)


def test_with_norms_held_only_patterns_answer() -> None:
    a = asked("skip", False)
    p = Prompt(a.t.params, a.t.recording, a.active, a.t.targets, cfg=a.t.cfg)
    way = live_way(p, past_norm=True, norms=False)
    got_RN = pulled_rows(p, p.all_rows(), way=way)
    for k, edge_N in p.written():
        got_RN[len(a.active.layer_A) + k] += edge_N
    close(got_RN, derivative("skip", False, True), 1e-12)


def test_how_rows_are_computed_changes_nothing() -> None:
    """Padded, patterns computed again, few nodes, small chunks on two devices.

    Progress counts all rows, in order.
    """
    a, full = asked("skip", False), graph("skip", False)
    t, seen = a.t, []
    later_T = jnp.concatenate([t.token_T, t.token_T[:2]])
    again = jax.jit(
        lambda params, token_T: record(params, token_T, cfg=t.cfg, keep_patterns=False)
    )(t.params, later_T)
    active = active_features(a.dictionary, t.params, again, t.cfg, len(t.token_T))
    config = dataclasses.replace(EVERYTHING, max_features=20, devices=2, chunk_size=8)
    p = Prompt(
        t.params,
        again,
        active,
        t.targets,
        cfg=t.cfg,
        config=config,
        n_tokens=len(t.token_T),
        dictionary=a.dictionary,
    )
    got = attribute_recording(p, t.meta, on_rows=lambda *x: seen.append(x))
    assert got.n_features == 20 < full.n_features
    key = list(zip(full.layer_A, full.pos_A, full.feature_A, strict=True))
    mine = zip(got.layer_A, got.pos_A, got.feature_A, strict=True)
    index = np.array([key.index(k) for k in mine])
    rows = np.r_[index, np.arange(full.n_features, len(full.edge_RN))]
    columns = np.r_[index, np.arange(full.n_features, full.edge_RN.shape[1])]
    assert got.response is not None
    assert full.response is not None
    want_RN = full.response.edge_RN[rows]
    close(got.response.edge_RN, want_RN[:, columns], 1e-12)
    left_out = np.delete(want_RN, columns, axis=1)
    close(got.response.rest_R, left_out.sum(1), 1e-12)
    # What a target reads of an MLP's output itself is summed apart.
    lost_R, n = np.abs(left_out).sum(1), got.n_features
    close(got.response.rest_abs_R[:n], lost_R[:n], 1e-12)
    assert (got.response.rest_abs_R[n:] > lost_R[n:] - 1e-12).all()
    parts, every = got.response.parts, full.response.parts
    at = every.find(rows[parts.row_E], columns[parts.col_E])
    assert (at >= 0).mean() > 0.9
    for name in PARTS:
        ours, theirs = (getattr(x, f"{name}_E") for x in (parts, every))
        close(ours[at >= 0], theirs[at[at >= 0]], 1e-12)
    done = [x for x, _ in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] > 2 * len(got.edge_RN)


def test_it_needs_the_dictionary() -> None:
    a = asked("skip", False)
    with pytest.raises(InputError, match="need the dictionary of the features"):
        Prompt(
            a.t.params,
            a.t.recording,
            a.active,
            a.t.targets,
            cfg=a.t.cfg,
            config=EVERYTHING,
        )
