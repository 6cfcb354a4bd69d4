"""Correlations and intervals, and what the graph predicts of groups."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.stats
from cases import random_graph

from jaxclt.graph.agreement import pearson, spearman
from jaxclt.graph.shares import shares_total
from jaxclt.validation.predictions import group_effects, pairwise_influence
from jaxclt.validation.stats import (
    bootstrap,
    mean_interval,
    ratio_interval,
    resampled,
    wilson,
)


def draws(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(jax.random.normal(jax.random.key(seed), (2, n)), np.float64)
    return x, y


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_scipys(seed: int):
    x, y = draws(seed, 40)
    y = np.round(y + x, 0)  # ties
    assert abs(spearman(x, y) - scipy.stats.spearmanr(x, y).statistic) < 1e-12
    assert abs(pearson(x, y) - scipy.stats.pearsonr(x, y).statistic) < 1e-12
    assert abs(pearson(x, y) - np.corrcoef(x, y)[0, 1]) < 1e-12
    rank_x, rank_y = (
        (v[:, None] > v).mean(1) + (v[:, None] >= v).mean(1) for v in (x, y)
    )
    assert abs(spearman(x, y) - np.corrcoef(rank_x, rank_y)[0, 1]) < 1e-12
    both = spearman(np.stack([x, y]), np.stack([y, y]), 1)
    np.testing.assert_allclose(both, [spearman(x, y), 1], atol=1e-12)
    square = (x.reshape(8, 5), y.reshape(8, 5))
    assert abs(pearson(*square) - pearson(x, y)) < 1e-12


def test_nothing_that_varies_is_no_correlation():
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert np.isnan(pearson(np.arange(2.0), np.arange(2.0)))
    assert np.isnan(pearson(np.full(5, 0.1), np.arange(5.0)))
    assert np.isnan(spearman(np.zeros(0), np.zeros(0)))
    # A side that hardly varies: whatever it is, nothing is said on the terminal.
    assert abs(pearson(1e9 + 1e-7 * np.arange(5), np.arange(5.0))) <= 1


def test_the_interval_holds_the_correlation_and_shrinks():
    x, y = draws(0, 400)
    y = x + y
    key = jax.random.key(1)
    low, high = bootstrap(spearman, x, y, key)
    assert low < spearman(x, y) < high
    few = bootstrap(spearman, x[:40], y[:40], key)
    assert few[1] - few[0] > 2 * (high - low)
    assert bootstrap(spearman, x, y, key) == (low, high)


def test_draws_without_a_correlation_are_left_out():
    """Of three units, a ninth of the draws are one unit alone."""
    x, key = np.arange(3.0), jax.random.key(0)
    assert bootstrap(pearson, x, x, key) == pytest.approx((1, 1))
    assert np.isnan(bootstrap(spearman, np.ones(3), x, key)).all()
    assert np.isnan(bootstrap(pearson, x[:2], x[:2], key)).all()
    assert ratio_interval(2 * x, x, key) == (2, 2)
    assert np.isnan(ratio_interval(x, 0 * x, key)).all()
    assert np.isnan(ratio_interval(np.append(x, np.nan), np.ones(4), key)).all()


def test_whole_units_are_drawn():
    """Targets that repeat one another hold no more than one of them."""
    x, y = draws(5, 60)
    y = x + y
    key = jax.random.key(3)
    alone = bootstrap(spearman, x, y, key)
    ten = bootstrap(spearman, np.tile(x, (10, 1)).T, np.tile(y, (10, 1)).T, key)
    np.testing.assert_allclose(np.diff(ten), np.diff(alone), rtol=0.15)


def test_draws_in_parts_are_as_many():
    calls = []

    def first(draw_NC: np.ndarray) -> np.ndarray:
        calls.append(draw_NC.shape)
        return draw_NC[:, 0].astype(float)

    found = resampled(first, 5, jax.random.key(0), n=30, width=1 << 18)
    assert calls == [(3, 5)] * 10
    assert 0 <= found[0] < found[1] <= 4


def test_pairwise_influence_is_the_walk_from_a_feature():
    graph = random_graph(3, counts=(6, 6, 6, 6))
    A, node = graph.n_features, np.array([20, 9])
    total = shares_total(graph)
    share = np.abs(graph.edge_RN[:A, :A]) / np.where(total > 0, total, 1)[:A, None]
    B = np.linalg.inv(np.eye(A) - share) - np.eye(A)
    np.testing.assert_allclose(pairwise_influence(graph, node), B[node], atol=1e-5)


def test_a_groups_effect_does_not_count_paths_between_members():
    """Against cutting the members' inputs, one group at a time."""
    graph = random_graph(5, counts=(5, 5, 5), n_tokens=1, density=1.0)
    A = graph.n_features
    groups = [np.array([0, 7]), np.array([2, 6, 11]), np.array([4])]
    found = group_effects(graph, groups)
    unit = graph.edge_RN[:, :A] / graph.value_A[None]
    for group, got in zip(groups, found, strict=True):
        cut = unit[:A].copy()
        cut[group] = 0
        effect = unit[A:] @ np.linalg.inv(np.eye(A) - cut)
        want = effect[:, group] @ graph.value_A[group]
        np.testing.assert_allclose(got, want, rtol=1e-4)
    alone = unit[A:] @ np.linalg.inv(np.eye(A) - unit[:A]) * graph.value_A
    assert np.abs(found[1] - alone[:, groups[1]].sum(1)).max() > 1e-3


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 9), (50, 100), (7, 7)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(hits: int, n: int, level: float):
    want = scipy.stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    found = np.array(wilson(hits, n, level=level))
    assert np.allclose(found, (want.low, want.high), atol=1e-12)
    # The equation that the ends solve, where they are not 0 or 1.
    p, z = found[(found > 0) & (found < 1)], scipy.stats.norm.ppf((1 + level) / 2)
    np.testing.assert_allclose((hits / n - p) ** 2, z**2 * p * (1 - p) / n, rtol=1e-9)


def test_nothing_asked_has_no_interval():
    key = jax.random.key(0)
    assert np.isnan(wilson(0, 0)).all()
    assert np.isnan(mean_interval(np.array([1.0]), key)).all()
    assert np.isnan(mean_interval(np.array([1.0, np.nan]), key)).all()


def test_the_means_interval_is_about_the_normal_one():
    x, _ = draws(3, 400)
    low, high = mean_interval(np.append(x, np.nan), jax.random.key(1))
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert abs((high - low) / (2 * half) - 1) < 0.1
    assert abs((high + low) / 2 - x.mean()) < 0.1 * half
    assert mean_interval(x, jax.random.key(1)) == (low, high)


def test_clusters_widen_the_interval():
    """Ten copies of each value hold no more than one of them."""
    x, _ = draws(4, 40)
    key, ten = jax.random.key(2), np.full(40, 10.0)
    alone = mean_interval(x, key)
    assert np.allclose(ratio_interval(10 * x, ten, key), alone)
    wrong = mean_interval(np.repeat(x, 10), key)
    assert wrong[1] - wrong[0] < 0.5 * (alone[1] - alone[0])
