"""The search on games whose best sets are known: by closed form, or by trying all."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from jaxclt.circuits.search import Found, Goal, Shares, fit, search, top


class Written:
    """A game of a function of sets, with its slopes by finite differences."""

    def __init__(self, m, n: int) -> None:
        self.m, self.n, self.asked = m, n, 0
        self.all, self.none = m(np.ones(n)), m(np.zeros(n))

    def measure(self, set_BA: np.ndarray) -> Shares:
        self.asked += len(set_BA)
        made = self.all - self.none
        keep = np.array([self.m(x.astype(float)) for x in set_BA])
        drop = np.array([self.m(1 - x.astype(float)) for x in set_BA])
        return Shares((keep - self.none) / made, (self.all - drop) / made)

    def slopes(self, set_A: np.ndarray) -> Shares:
        x, made, e = set_A.astype(float), self.all - self.none, 1e-6
        eye = np.eye(self.n) * e
        keep = [(self.m(x + d) - self.m(x - d)) / (2 * e * made) for d in eye]
        drop = [(self.m(1 - x + d) - self.m(1 - x - d)) / (2 * e * made) for d in eye]
        return Shares(np.array(keep), np.array(drop))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal draws."""
    return np.asarray(jax.random.normal(jax.random.key(seed), shape)).astype(float)


def ranks(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A ranking that says nothing."""
    return {"drawn": drawn(n, seed=seed)}


def places(found: Found) -> list[int]:
    return np.flatnonzero(found.set_A).tolist()


def test_the_fit_of_shares():
    """Maths 24.4."""
    np.testing.assert_allclose(fit(np.array([0, 0.8, 1, 1.2, 3])), [0, 0.8, 1, 0.8, -1])
    shares = Shares(np.array([1.0, 0.5, np.nan]), np.array([0.5, 1.5, 1.0]))
    np.testing.assert_allclose(shares.score[:2], [0.75, 0.5])
    assert np.isneginf(shares.score[2])
    assert np.isneginf(shares.least[2])


def test_the_highest_of_some():
    score_A = np.array([3.0, 1, 2, 0])
    assert top(score_A, 2).tolist() == [True, False, True, False]
    among_A = np.array([False, True, True, False])
    assert top(score_A, 3, among_A).tolist() == [False, True, True, False]


@pytest.mark.parametrize("n", [6, 60, 300])
def test_a_sum_is_cut_where_it_reaches_the_share(n: int):
    """Of m = w · x the smallest set is the largest weights up to the share."""
    w = 0.8 ** np.arange(n)
    order = np.argsort(drawn(n, seed=n))
    game = Written(lambda x: float(w[order] @ x), n)
    found = search(game, ranks(n), Goal(share=0.9))
    need = int(np.argmax(np.cumsum(w) / w.sum() >= 0.9)) + 1
    assert found.reached
    assert sorted(order[places(found)].tolist()) == list(range(need))


@pytest.mark.parametrize("planted", [(3, 7), (1, 4, 8), (0, 2, 5, 9)])
def test_all_of_a_product_are_found_and_no_others(planted: tuple[int, ...]):
    """No member does anything alone; others add a little each."""

    def m(x: np.ndarray) -> float:
        return float(np.prod(x[list(planted)]) + 1e-3 * x.sum())

    found = search(Written(m, 12), ranks(12), Goal(share=0.95))
    assert found.reached
    assert places(found) == list(planted)


def test_what_works_against_the_answer_is_part_of_it():
    """Without the negative one the set overshoots, with sufficiency 2."""
    w = np.array([2.0, -1.0, *np.zeros(20)])
    game = Written(lambda x: float(w @ x), len(w))
    found = search(game, ranks(len(w)), Goal(share=0.9))
    assert places(found) == [0, 1]


def test_nothing_good_is_said_to_be_so():
    """All that there is does half of it."""
    game = Written(lambda x: float(x[0] * x[1]), 3)
    measure = game.measure
    game.measure = lambda set_BA: Shares(*(0.5 * x for x in measure(set_BA)))
    found = search(game, ranks(3), Goal(share=0.8))
    assert not found.reached
    assert places(found) == [0, 1]


def random_game(seed: int, n: int) -> Written:
    """A function with products of two and three, of both signs."""
    w, w_4 = drawn(n, seed=seed), drawn(4, n, n, seed=seed)
    w_2, w_3 = w_4[:2] * (w_4[2:] > 1.3)  # a tenth of the pairs
    return Written(lambda x: float(3 + w @ x + x @ w_2 @ x + (x @ w_3 @ x) * x[0]), n)


def test_of_a_size_nearly_always_the_best_of_all_subsets():
    """Against all subsets of one to four of ten, two of sixteen may be missed."""
    n, gaps = 10, []
    for seed, k in itertools.product(range(4), (1, 2, 3, 4)):
        game = random_game(seed, n)
        found = search(game, ranks(n, seed), Goal(size=k, beam=3))
        assert found.set_A.sum() == k
        subsets = itertools.combinations(range(n), k)
        sets = np.array([np.isin(np.arange(n), chosen) for chosen in subsets])
        every = game.measure(sets).score
        own = float(game.measure(found.set_A[None]).score[0])
        assert own >= np.quantile(every, 0.95)
        gaps.append(every.max() - own)
    assert (np.array(gaps) > 0.01).sum() <= 2


def test_it_is_never_worse_than_a_ranking_of_equal_size():
    w_1, w_2 = drawn(80, seed=5), drawn(80, 80, seed=6) / 20
    game = Written(lambda x: float(1 + w_1 @ x + x @ w_2 @ x), 80)
    rank = {"one": w_1, "two": w_2.sum(0), "three": drawn(80, seed=7)}
    for goal in (Goal(share=0.9), Goal(size=20)):
        found = search(game, rank, goal)
        k = int(found.set_A.sum())
        sets = [found.set_A, *(top(x, k) for x in rank.values())]
        score = game.measure(np.stack(sets)).score
        assert score[0] == score.max()


def test_a_beam_measures_more_and_the_same_call_the_same():
    w = drawn(40, seed=1)
    sizes = []
    for beam in (1, 1, 3):
        game = Written(lambda x: float(np.tanh(w @ x / 3) + 0.1 * x.sum()), 40)
        found = search(game, ranks(40), Goal(share=0.9, beam=beam))
        sizes.append((game.asked, places(found)))
    assert sizes[0] == sizes[1]
    assert sizes[2][0] > sizes[0][0]
