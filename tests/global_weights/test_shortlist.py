"""Features shortlisted by global weights: exact graphs of a part, honest bounds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from cases import case, case_active

from jaxclt.global_weights.ranking import Links
from jaxclt.global_weights.shortlist import LINKED, Shortlist
from jaxclt.graph.attribute import AttributeConfig, attribute_recording
from jaxclt.graph.certificate import certificate
from jaxclt.graph.prompt import Prompt
from jaxclt.graph.scores import scores

pytestmark = pytest.mark.usefixtures("x64")


def links(rows: list[tuple[int, int, int, int, float]]) -> Links:
    """From (source layer, feature, target layer, feature, V)."""
    place = np.array([row[:4] for row in rows], np.int32).reshape(-1, 4).T
    value = np.array([row[4] for row in rows], float)
    return Links(*place, *(value,) * 6)


def graph_of(name: str, shortlist=None, **config):
    t = case(name)
    with jax.enable_x64(True):
        return attribute_recording(
            Prompt(
                t.params,
                t.recording,
                case_active(name),
                t.targets,
                cfg=t.cfg,
                config=AttributeConfig(tolerance=0.0, devices=1, **config),
                shortlist=shortlist,
            ),
            t.meta,
        )


@pytest.mark.parametrize("name", ["clt", "skip"])
def test_a_full_shortlist_changes_nothing(name: str):
    every = graph_of(name, max_features=None, direction="pull")
    listed = graph_of(name, Shortlist(links([]), 10**6), max_features=None)
    np.testing.assert_allclose(listed.edge_RN, every.edge_RN, atol=1e-12)
    np.testing.assert_array_equal(listed.layer_A, every.layer_A)


@pytest.mark.parametrize("size", [1, 7, 15])
def test_rows_of_a_part_are_those_of_the_whole(size: int):
    """Edges stay exact; what is left out is in the rest, and the bounds hold."""
    every = graph_of("clt", max_features=None)
    drawn = jax.random.permutation(jax.random.key(size), every.n_features)
    chosen = np.sort(np.asarray(drawn)[:size])
    part = graph_of("clt", lambda active, visit_A: chosen, max_features=None)
    assert part.n_features == size
    np.testing.assert_array_equal(part.layer_A, every.layer_A[chosen])
    other = np.arange(every.n_features, every.edge_RN.shape[1])
    rows = np.r_[chosen, np.arange(every.n_features, len(every.edge_RN))]
    want = every.edge_RN[rows][:, np.r_[chosen, other]]
    np.testing.assert_allclose(part.edge_RN, want, atol=1e-12)
    assert certificate(part).max_relative_row_error < 1e-12
    least, exact = scores(part), scores(every)
    assert least.replacement - 1e-12 <= exact.replacement
    assert exact.replacement <= least.replacement_at_most + 1e-12
    assert exact.completeness <= least.completeness_at_most + 1e-12
    # fewer rows than are listed: the most influential ones of the list
    fewer = graph_of("clt", lambda active, visit_A: chosen, max_features=3)
    assert fewer.n_features == min(3, size)
    place = set(zip(part.layer_A, part.pos_A, part.feature_A, strict=True))
    assert set(zip(fewer.layer_A, fewer.pos_A, fewer.feature_A, strict=True)) <= place


def test_the_guess_hands_influence_down_the_links():
    """Written out for three features in a row, at one position."""
    active = case_active("clt")
    pos = int(active.pos_A.max())
    at = {
        l: np.flatnonzero((active.layer_A == l) & (active.pos_A == pos))[0]
        for l in (0, 1, 2)
    }
    elsewhere = np.flatnonzero(
        (active.layer_A == 0)
        & (active.pos_A == 0)
        & (active.feature_A != active.feature_A[at[0]])
    )[0]
    keep = np.zeros(len(active.layer_A), bool)
    keep[[*at.values(), elsewhere]] = True
    some = active.where(keep)
    places = zip(some.layer_A, some.pos_A, strict=True)
    slot = {place: a for a, place in enumerate(places)}
    f = {l: int(some.feature_A[slot[l, pos]]) for l in (0, 1, 2)}
    away = slot[0, 0]
    table = links(
        [
            (1, f[1], 2, f[2], -2.0),
            (0, f[0], 2, f[2], 1.0),
            (0, f[0], 1, f[1], 3.0),
            (0, int(some.feature_A[away]), 2, f[2], 50.0),  # at another position
        ]
    )
    visit = np.zeros(4)
    visit[slot[2, pos]] = 1.0
    found = Shortlist(table, 2).guess(some, visit)
    a = {l: abs(float(some.value_A[slot[l, pos]])) for l in (0, 1)}
    total = 2 * a[1] + a[0]
    to_1 = LINKED * 2 * a[1] / total
    to_0 = LINKED * a[0] / total + LINKED * to_1
    assert found[slot[1, pos]] == pytest.approx(to_1)
    assert found[slot[0, pos]] == pytest.approx(to_0)
    assert found[away] == 0
    chosen = Shortlist(table, 2)(some, visit)
    assert len(chosen) == 2
    assert slot[2, pos] in chosen
    assert away not in chosen
    np.testing.assert_array_equal(chosen, np.sort(chosen))
