"""One ablation away: what is reported, and what is not, run through the model."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from cases import case, case_active, case_local, case_lrm, close

from jaxclt.clt.active import Active
from jaxclt.clt.store import ParamsStore
from jaxclt.clt.transcoder import StoreDictionary
from jaxclt.errors import InputError
from jaxclt.graph.config import AttributeConfig
from jaxclt.graph.inhibition import (
    Inhibition,
    find_inhibition,
    near_threshold,
    released_by,
)
from jaxclt.graph.prompt import Recorded
from jaxclt.replacement.local import run_local

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ["clt", "skip"]  # the second reads after the norm and has a linear path


@functools.cache
def find(
    name: str, margin: float = math.inf, active: Active | None = None, **config: int
) -> Inhibition:
    t = case(name)
    return find_inhibition(
        Recorded(t.params, t.recording, active or case_active(name), cfg=t.cfg),
        t.dictionary,
        margin=margin,
        limit=None,
        config=AttributeConfig(chunk_size=32, **config),
    )


@functools.cache
def without(name: str) -> np.ndarray:
    """Pre-activations [A, L, T, F], source s set to zero in entry s, all else held."""
    lrm, active = case_lrm(name), case_active(name)
    clean = np.asarray(case_local(name).a_LTF)
    a = np.broadcast_to(clean, (len(active.layer_A), *clean.shape)).copy()
    a[np.arange(len(a)), active.layer_A, active.pos_A, active.feature_A] = 0
    run = jax.jit(jax.vmap(lambda a_LTF: run_local(lrm, a_LTF=a_LTF).pre_LTF))
    return np.asarray(run(a))


def thresholds(name: str) -> np.ndarray:
    """Thresholds [L, 1, F]."""
    return np.asarray(case(name).clt.theta_LF)[:, None]


def pairs(found: Inhibition) -> set[tuple[int, int, int, int]]:
    """(layer, position, feature) of what is released, and by which active feature."""
    c, (u, s, _) = found.candidates, found.released
    place = (c.layer_U[u], c.pos_U[u], c.feature_U[u], s)
    return set(zip(*(column.tolist() for column in place), strict=True))


def released_in_the_model(
    name: str, margin: float = math.inf
) -> set[tuple[int, int, int, int]]:
    pre, theta = np.asarray(case_local(name).pre_LTF), thresholds(name)
    near = (pre <= theta) & (theta - pre <= margin)
    s, layer, pos, feature = np.nonzero((without(name) > theta) & near)
    return set(
        zip(layer.tolist(), pos.tolist(), feature.tolist(), s.tolist(), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_reported_pairs_release_and_no_others_do(name: str) -> None:
    """All inactive features times all sources; the crossing is as far as predicted."""
    found = find(name)
    want = released_in_the_model(name)
    assert len(want) > 20
    assert pairs(found) == want
    assert len(found.released.u_P) == len(want)
    c, (u, s, gap) = found.candidates, found.released
    pre = without(name)[s, c.layer_U[u], c.pos_U[u], c.feature_U[u]]
    np.testing.assert_allclose(pre - c.theta_U[u], gap, rtol=0, atol=1e-12)
    assert (gap > 0).all()
    assert (np.diff(gap) <= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_the_inactive_features(name: str) -> None:
    c = find(name).candidates
    pre = np.asarray(case_local(name).pre_LTF)
    layer, pos, feature = np.nonzero(pre <= thresholds(name))
    for got, want in ((c.layer_U, layer), (c.pos_U, pos), (c.feature_U, feature)):
        np.testing.assert_array_equal(got, want)
    close(c.preact_U, pre[layer, pos, feature], 1e-12)
    mid = np.asarray(case(name).recording.mid_LTD)[layer, pos]
    bias = np.asarray(case(name).clt.b_enc_LF)[layer, feature]
    close((c.read_UD * mid).sum(1) + bias, c.preact_U, 1e-12)


def test_margin_and_limit_cut_the_far_ones() -> None:
    everything = find("clt").candidates
    below = everything.theta_U - everything.preact_U
    steps = np.unique(below[find("clt").released.u_P])
    margin = float(steps[len(steps) // 2 :][:2].mean())
    found = find("clt", margin=margin, rows_per_update=37)
    assert len(found.candidates.layer_U) == (below <= margin).sum()
    want = released_in_the_model("clt", margin)
    assert 0 < len(want) < len(pairs(find("clt")))
    assert pairs(found) == want
    t = case("clt")
    prompt = Recorded(t.params, t.recording, case_active("clt"), cfg=t.cfg)
    nearest = near_threshold(prompt, t.dictionary, margin=math.inf, limit=25)
    index = np.sort(np.argsort(below)[:25])
    for name, got in vars(nearest).items():
        np.testing.assert_array_equal(got, getattr(everything, name)[index])


def test_a_dictionary_without_thresholds_releases_at_zero() -> None:
    t = case("clt")
    dictionary = StoreDictionary(
        ParamsStore(
            t.clt.replace(theta_LF=None),
            dataclasses.replace(t.clt_cfg, activation="relu"),
        )
    )
    prompt = Recorded(t.params, t.recording, t.active, cfg=t.cfg, n_tokens=4)
    c = near_threshold(prompt, dictionary, margin=math.inf)
    pre = np.asarray(case_local("clt").pre_LTF)[:, :4]
    place = np.nonzero(pre <= 0)
    np.testing.assert_array_equal((c.layer_U, c.pos_U, c.feature_U), place)
    close(c.preact_U, pre[place], 1e-12)
    assert not c.theta_U.any()


def test_no_candidates_and_fewer_sources() -> None:
    none = find("clt", margin=0.0)
    assert len(none.candidates.layer_U) == len(none.released.u_P) == 0
    # Features that are no nodes became part of the error nodes; the others still act.
    active = case_active("clt")
    keep_A = np.arange(len(active.layer_A)) % 3 == 0
    found = find.__wrapped__("clt", active=active.where(keep_A))
    old = np.flatnonzero(keep_A)
    got = {(*place, int(old[s])) for *place, s in pairs(found)}
    assert got == {pair for pair in pairs(find("clt")) if keep_A[pair[3]]}


def test_released_by_states_the_rule() -> None:
    """h <= theta < h - A, strict where the activation is."""
    preact, theta = np.array([1.0, 0.5, 2.0]), np.array([1.0, 1.0, 1.0])
    edge = np.array([[0.0, -0.25, 0.5], [-0.5, -0.75, -2.0], [-1.0, -1.0, -1.0]])
    u, s, gap = released_by(edge, preact, theta)
    assert list(zip(u, s, gap, strict=True)) == [
        (1, 2, 1.5),
        (0, 1, 0.25),
        (1, 1, 0.25),
    ]


def test_bad_requests_are_refused() -> None:
    t = case("clt")
    cfg = dataclasses.replace(t.clt_cfg, activation="signed_topk", k=4)
    topk = StoreDictionary(ParamsStore(t.clt, cfg))
    prompt = Recorded(t.params, t.recording, t.active, cfg=t.cfg)
    with pytest.raises(InputError, match="topk"):
        near_threshold(prompt, topk, margin=1.0)
    for margin in (-1.0, math.nan):
        with pytest.raises(InputError, match="margin"):
            find("clt", margin=margin)
