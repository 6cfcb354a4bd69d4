"""How perturbations spread (maths 16.4 to 16.9), and the exact dictionary."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import case, case_active, close

from jaxclt.clt.active import Active, active_features
from jaxclt.clt.coder import Dictionary
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.lm import layers
from jaxclt.patching.change import Change, batched
from jaxclt.patching.features import gather_features
from jaxclt.patching.how import How
from jaxclt.patching.local import Local, make_local
from jaxclt.patching.modes import Nudge, patched, underlying
from jaxclt.patching.patchable import Patchable, hold_of, make_patchable
from jaxclt.validation.faithfulness import _perturbations
from jaxclt.validation.jacobian import jacobian_agreement
from jaxclt.validation.perturb import (
    Agreement,
    Perturbation,
    agreements,
    compare,
    nudged,
    perturb_many,
    upstream,
)

pytestmark = pytest.mark.usefixtures("x64")

L, T, D = 4, 6, 16
# Of which case, and whether its neurons are the dictionary.
KINDS = {"clt": ("clt", False), "neurons": ("clt", True), "parallel": ("neox", True)}


@functools.cache
def parts(kind: str) -> tuple[Dictionary, Active, Patchable, Local]:
    with jax.enable_x64(True):
        name, neurons = KINDS[kind]
        t = case(name)
        dictionary = NeuronDictionary(None) if neurons else t.dictionary
        active = active_features(dictionary, t.params, t.recording, t.cfg)
        model = make_patchable(dictionary, t.params, t.recording, t.cfg)
        return dictionary, active, model, make_local(dictionary, model, active)


@functools.cache
def perturbations(kind: str, size: float = 0.1) -> Perturbation:
    """Along encoders, at random and upstream, each at layers 1 and 2."""
    dictionary, a, model, local = parts(kind)
    layers = np.array([1, 2])
    here = [np.flatnonzero((a.layer_A == l) & (a.pos_A > 0))[0] for l in layers]
    before = [np.flatnonzero(a.layer_A == l - 1)[3] for l in layers]

    def change(slots: Any, offset: float) -> Change:
        places = np.stack([a.layer_A, a.pos_A, a.feature_A], 1)[slots]
        features = gather_features(dictionary, model, places)
        return local.placed(batched(Change.of(features, 1.0, offset), [1, 1]))

    way = [jax.random.normal(jax.random.key(l), (D,), jnp.float64) for l in layers]
    made = [
        nudged(change(here, 0.0), layers, a.pos_A[here], size * np.asarray(vector), T)
        for vector in (a.reads(np.array(here)), way)
    ]
    made.append(upstream(change(before, size), layers, T))
    return jax.tree.map(lambda *x: np.concatenate(x), *made)


def how(norms: str, gates: Any = "live") -> How:
    return How(mode="iterative", norms=norms, gates=gates)


@functools.cache
def measured(kind: str, norms: Any) -> Agreement:
    with jax.enable_x64(True):
        _, _, model, local = parts(kind)
        return perturb_many(
            model, local.tables, perturbations(kind), hows=(how(norms),), chunk=4
        )[0]


@pytest.mark.parametrize("norms", ["frozen", "live"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_models_start_from_the_same_perturbation(kind: str, norms: str):
    """Maths 16.5, and nothing is said of layers before it."""
    found = measured(kind, norms)
    for row, layer in enumerate(perturbations(kind).nudge.layer):
        assert np.isnan(found.cosine_L[row, :layer]).all()
        np.testing.assert_allclose(found.cosine_L[row, layer], 1, atol=1e-12)
        np.testing.assert_allclose(found.nmse_L[row, layer], 0, atol=1e-12)


@pytest.mark.parametrize("kind", ["neurons", "parallel"])
def test_the_exact_dictionary_with_live_norms_is_faithful_everywhere(kind: str):
    """Maths 16.6: all neurons, gates and norms live. With frozen norms it is not."""
    live, frozen = measured(kind, "live"), measured(kind, "frozen")
    behind = ~np.isnan(live.cosine_L)
    assert behind.sum() == 3 * (3 + 2)
    np.testing.assert_allclose(live.cosine_L[behind], 1, atol=1e-12)
    np.testing.assert_allclose(live.nmse_L[behind], 0, atol=1e-12)
    assert np.nanmax(frozen.nmse_L) > 1e-5
    assert np.nanmax(measured("clt", "live").nmse_L) > 1e-2


def test_the_error_is_a_function_of_cosine_and_size_ratio():
    """Maths 16.7, and so nmse is at least 1 - cosine squared."""
    one, other = jax.random.normal(jax.random.key(3), (2, L, T, D), jnp.float64)
    for found in (compare(one, other), measured("clt", "frozen")):
        rho, cosine = np.asarray(found.ratio_L), np.asarray(found.cosine_L)
        kept = ~np.isnan(cosine)
        want = 1 + rho**2 - 2 * rho * cosine
        close(np.asarray(found.nmse_L)[kept], want[kept], 1e-12)
        assert (found.nmse_L[kept] >= 1 - cosine[kept] ** 2 - 1e-12).all()


def test_small_perturbations_measure_the_jacobians():
    """Maths 16.8: the limit is the agreement of the two linear responses."""
    _, _, model, local = parts("clt")
    one = jax.tree.map(lambda x: x[2], perturbations("clt"))  # at random, in layer 1
    small = dataclasses.replace(
        one,
        nudge=Nudge(layer=one.nudge.layer, delta_TD=1e-6 * one.nudge.delta_TD),
    )
    found = jax.jit(
        lambda p: agreements(model, local.tables, p, hows=(how("frozen", "frozen"),))[0]
    )(small)

    def real(x: jax.Array) -> jax.Array:
        nudge = Nudge(layer=one.nudge.layer, delta_TD=x)
        hold = hold_of(model.recording, How())
        return underlying(model, nudge.layer, hold, nudge=nudge).taps.mid_TD

    def replacement(x: jax.Array) -> jax.Array:
        return patched(
            model, one.change, jnp.stack([one.start, L - 1]),
            how=how("frozen", "frozen"), tables=local.tables,
            nudge=Nudge(layer=one.nudge.layer, delta_TD=x),
        ).taps.mid_TD  # fmt: skip

    start, way = np.zeros((T, D)), np.asarray(one.nudge.delta_TD)
    want = jax.jit(
        lambda: compare(*(jax.jvp(f, (start,), (way,))[1] for f in (replacement, real)))
    )()
    layer = int(one.nudge.layer)
    np.testing.assert_allclose(
        found.nmse_L[layer + 1 :], want.nmse_L[layer + 1 :], rtol=1e-4
    )
    assert want.nmse_L[layer + 1] > 1e-3
    assert len(case_active("clt").layer_A)


@pytest.mark.parametrize("kind", ["neurons", "parallel"])
def test_all_neurons_have_the_mlps_derivative_and_others_do_not(kind: str):
    """Maths 16.9: zero distance for the exact dictionary, gates live."""
    key = jax.random.key(0)
    for norms in ("frozen", "live"):
        _, _, model, local = parts(kind)
        exact = jacobian_agreement(model, local.tables, key, how=how(norms))
        np.testing.assert_allclose(exact.cosine_L, 1, atol=1e-12)
        np.testing.assert_allclose(exact.nmse_L, 0, atol=1e-12)
    kept = how("live", "frozen")
    graph = jacobian_agreement(model, local.tables, key, how=kept)
    assert (graph.nmse_L > 1e-3).all()


def test_jacobian_distance_is_the_frobenius_norm():
    """Against full Jacobians, at one position and layer."""
    _, _, model, local = parts("clt")
    got = jacobian_agreement(
        model, local.tables, jax.random.key(0),
        how=how("frozen", "frozen"), n_probes=4000,
    )  # fmt: skip
    cfg, rec, layer = model.cfg, model.recording, 1
    p, table = jax.tree.map(lambda x: x[layer], (model.params.blocks, local.tables))
    scale_T, mid_TD = rec.frozen.mlp_scale_LT[layer], rec.mid_LTD[layer]
    assert model.coder.site == "resid_mid"
    top = bottom = 0.0
    for t in range(len(mid_TD)):

        def mlp(mid_D: jax.Array, t: int = t) -> jax.Array:
            norm = layers.mlp_norm(p)
            normed = layers.normalise(mid_D[None], scale_T[t][None], norm)
            return layers.mlp(p, normed, cfg=cfg)[0]

        J_mlp = np.asarray(jax.jit(jax.jacobian(mlp))(mid_TD[t]))
        on_U = np.asarray(table.clean_LTU[t]) != 0
        read_UD = np.asarray(table.enc.W_enc_FD)[on_U]
        J_clt = np.asarray(table.dec)[on_U, 0].T @ read_UD
        top += ((J_clt - J_mlp) ** 2).sum()
        bottom += (J_mlp**2).sum()
    np.testing.assert_allclose(got.nmse_L[layer], top / bottom, rtol=0.05)


def test_draws_are_counted_and_data_points_to_another_position():
    """Maths 16.4: as long as along the encoder, towards what another position holds."""
    with jax.enable_x64(True):
        dictionary, active, model, local = parts("clt")
        subject: Any = SimpleNamespace(
            patchable=model, active=active, local=local, n_tokens=T
        )
        subject.gather = lambda places: gather_features(dictionary, model, places)
        made = _perturbations(subject, [1, 2], jax.random.key(0), 5, 0.1, 0.1)
        mid_LTD = np.asarray(model.recording.mid_LTD)
        (_, along), (row_B, towards) = made["encoder"], made["data"]
        _, by_rise = made["absolute"]
        assert by_rise is not None
        layer_B, pos_B = np.asarray(by_rise.nudge.layer), np.asarray(by_rise.pos)
        for b, (l, t) in enumerate(zip(layer_B, pos_B, strict=True)):
            one_D, rise_D = (
                np.asarray(x.nudge.delta_TD)[b, t] for x in (along, by_rise)
            )
            # Parallel to the other, and the feature reads 0.1 more of it.
            close(
                np.abs(one_D @ rise_D), np.prod([*map(np.linalg.norm, (one_D, rise_D))])
            )
            slots = np.flatnonzero((active.layer_A == l) & (active.pos_A == t))
            rises = active.reads(slots) @ rise_D
            assert np.isclose(rises, 0.1, rtol=0, atol=1e-12).any()
        assert along is not None
        assert towards is not None
        assert np.bincount(row_B).tolist() == [5, 5]
        for b in range(len(row_B)):
            layer, pos = int(towards.nudge.layer[b]), int(towards.pos[b])
            one_D, data_D = (
                np.asarray(x.nudge.delta_TD)[b, pos] for x in (along, towards)
            )
            close(np.linalg.norm(data_D), np.linalg.norm(one_D), 1e-12)
            ways_TD = mid_LTD[layer] - mid_LTD[layer, pos]
            size_T = np.linalg.norm(ways_TD, axis=1) * np.linalg.norm(data_D)
            cosine_T = ways_TD @ data_D / np.where(size_T > 0, size_T, np.inf)
            assert cosine_T[1:].max() == pytest.approx(1, abs=1e-9)


def test_flipped_features_are_counted_one_by_one():
    """Against numpy: pre-activations on two sides of their thresholds."""
    _, _, model, local = parts("clt")
    assert model.coder.site == "resid_mid"
    large = perturbations("clt", 3.0)
    hows = how("frozen"), how("live", "frozen")
    live, held = perturb_many(model, local.tables, large, hows=hows, chunk=4)
    assert np.isnan(held.flipped).all()
    rec, enc = model.recording, local.tables.enc
    W_LFD, b_LF = np.asarray(enc.W_enc_FD), np.asarray(enc.b_enc_F)
    theta_LF = np.asarray(enc.theta_F)
    for b in range(len(live.flipped)):
        one = jax.tree.map(lambda x, b=b: jnp.asarray(x[b]), large)
        done = jax.jit(
            lambda one: patched(
                model, one.change, jnp.stack([one.start, L - 1]), how=hows[0],
                tables=local.tables, nudge=one.nudge,
            ).taps.mid_TD
        )(one)  # fmt: skip
        layer, pos = int(one.nudge.layer), int(one.pos)
        mid_LTD = np.array(done)
        mid_LTD[layer] += np.asarray(one.nudge.delta_TD)
        on = [
            np.einsum("ltd,lfd->ltf", x, W_LFD) + b_LF[:, None] > theta_LF[:, None]
            for x in (mid_LTD, np.asarray(rec.mid_LTD))
        ]
        flips = (on[0] != on[1])[layer:, pos:].sum()
        assert live.flipped[b] == flips
    assert live.flipped.max() > 3
