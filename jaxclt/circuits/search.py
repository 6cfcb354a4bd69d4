"""The search for a small set that is enough and needed (maths 24.4); no model in it.

A set is bool over candidates. Whoever plays says two things of sets: their sufficiency
and necessity (measured), and what each candidate would change to first order
(predicted). Blocks are added as predicted, measured, the best kept; then what adds
nothing is taken out again, the least first, each step measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["Found", "Game", "Goal", "Shares", "fit", "search", "top"]

TRIES = 16  # sets that are measured in one step
ALONE = 48  # members up to which each is left out by itself at the end
FIRST = 64  # of the candidates, the share of the first block
LOSS = 0.02  # of the best score that pruning may cost where no set is good enough
PAIRS = 24  # single members exchanged for single others in a round
SWAPS = 4  # rounds in which members are exchanged
ROUNDS = 24  # of pruning to what is needed


class Shares(NamedTuple):
    """Of sets, [B]: shares of what all features do, see maths 24.3."""

    sufficiency: np.ndarray
    necessity: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """How near both are to 1, in the mean; 1 is both, minus infinity no answer."""
        both = fit(self.sufficiency) + fit(self.necessity)
        return np.where(np.isfinite(both), both / 2, -np.inf)

    @property
    def least(self) -> np.ndarray:
        """How near to 1 the one that is farther from it is."""
        both = np.minimum(fit(self.sufficiency), fit(self.necessity))
        return np.where(np.isfinite(both), both, -np.inf)

    def at(self, b: int) -> tuple[float, float]:
        """Both of one set."""
        return float(self.sufficiency[b]), float(self.necessity[b])


def fit(share: np.ndarray) -> np.ndarray:
    """1 - |1 - share|: what overshoots is as far off as what falls short."""
    return 1 - np.abs(1 - share)


class Game(Protocol):
    """What the search plays on, A candidates."""

    def measure(self, set_BA: np.ndarray) -> Shares:
        """Measured shares of sets, bool [B, A]."""
        ...

    def slopes(self, set_A: np.ndarray) -> Shares:
        """By candidate what membership adds to both shares of a set, predicted [A]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """When a set is good, and how hard to look."""

    share: float = 0.8  # that both must reach
    size: int | None = None  # of the set instead, as good as it gets
    beam: int = 1  # sets that are carried on side by side


class Found(NamedTuple):
    """A set, and whether it is as good as was asked for."""

    set_A: np.ndarray
    reached: bool


def top(score_A: np.ndarray, n: int, among_A: np.ndarray | None = None) -> np.ndarray:
    """The n candidates of the highest score as a set, first ones of equals."""
    if among_A is not None:
        score_A = np.where(among_A, score_A, -np.inf)
        n = min(n, int(among_A.sum()))
    found_A = np.zeros(len(score_A), bool)
    found_A[np.argsort(-score_A, kind="stable")[:n]] = True
    return found_A


class _Player:
    """A game whose sets are measured once."""

    def __init__(self, game: Game, rankings: Mapping[str, np.ndarray]) -> None:
        self.game, self.rankings = game, list(rankings.values())
        self._known: dict[bytes, tuple[float, float]] = {}

    def measure(self, sets: Iterable[np.ndarray]) -> tuple[list[np.ndarray], Shares]:
        """Different sets among those given, and their shares."""
        unique = list({np.packbits(one).tobytes(): one for one in sets}.items())
        new = [(key, one) for key, one in unique if key not in self._known]
        if new:
            shares = self.game.measure(np.stack([one for _, one in new]))
            rows = zip(*shares, strict=True)
            for (key, _), (s, n) in zip(new, rows, strict=True):
                self._known[key] = float(s), float(n)
        pairs = np.array([self._known[key] for key, _ in unique]).reshape(-1, 2)
        return [one for _, one in unique], Shares(*pairs.T)

    def worth(self, set_A: np.ndarray) -> np.ndarray:
        """Predicted change of the score by each candidate's membership [A]."""
        _, now = self.measure([set_A])
        steps = self.game.slopes(set_A)
        worth_A = np.zeros(len(set_A))
        for share_1, step_A in zip(now, steps, strict=True):
            step_A = np.where(np.isfinite(step_A), step_A, 0.0)
            # What has overshot is mended by what lowers it.
            worth_A += step_A if not share_1[0] > 1 else -step_A
        return worth_A / 2


def search(game: Game, rankings: Mapping[str, np.ndarray], goal: Goal) -> Found:
    """A small set that is enough and needed.

    Args:
      game: what is played on.
      rankings: scores of all candidates, of which the highest are tried first; [A].
      goal: how good, or how large.
    """
    n = len(next(iter(rankings.values())))
    player = _Player(game, rankings)
    size = None if goal.size is None else min(goal.size, n)
    best_A, seen = _grow(player, n, goal, size)
    if size is not None:
        seen.append(_down_to(player, best_A, size))
        seen += [top(rank_A, size) for rank_A in player.rankings]
        sets, shares = player.measure(one for one in seen if one.sum() == size)
        best = np.argsort(-shares.score, kind="stable")[: goal.beam]
        sets, shares = player.measure([_swap(player, sets[b]) for b in best])
        best_A = sets[int(shares.score.argmax())]
        return Found(best_A, bool(_least(player, best_A) >= goal.share))
    reached = bool(_least(player, best_A) >= goal.share)
    if not reached:
        sets, shares = player.measure(seen)
        best_A = sets[int(shares.score.argmax())]
    best_A = _prune(player, best_A, goal.share if reached else None)
    better_A = _swap(player, best_A)
    if not reached or _least(player, better_A) >= goal.share:
        best_A = _prune(player, better_A, goal.share if reached else None)
    # A set of a ranking may be as small and better.
    k = int(best_A.sum())
    sets, shares = player.measure([best_A, *(top(r, k) for r in player.rankings)])
    good_B = shares.least >= goal.share if reached else np.ones(len(sets), bool)
    return Found(sets[int(np.where(good_B, shares.score, -np.inf).argmax())], reached)


def _least(player: _Player, set_A: np.ndarray) -> float:
    return float(player.measure([set_A])[1].least[0])


def _grow(
    player: _Player, n: int, goal: Goal, size: int | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Sets of growing size, until one is good or, of a given size, twice as large."""
    most = n if size is None else min(n, 2 * size)
    beam, seen = [np.zeros(n, bool)], []
    now = 0
    while now < most:
        step = max(1, now, n // FIRST)
        if size is not None and now < size:
            step = min(step, size - now)
        step = min(step, most - now)
        tried = [top(rank_A, now + step) for rank_A in player.rankings]
        for set_A in beam:
            worth_A = player.worth(set_A)
            tried.append(top(worth_A, now + step))
            for rank_A in (worth_A, *player.rankings):
                tried.append(set_A | top(rank_A, step, ~set_A))
            if step == 1:
                more = top(worth_A, TRIES, ~set_A)
                tried += [set_A | one for one in np.eye(n, dtype=bool)[more]]
        now += step
        sets, shares = player.measure(tried)
        order = np.argsort(-shares.score, kind="stable")[: goal.beam]
        beam = [sets[b] for b in order]
        seen += beam
        if size is None and shares.least.max() >= goal.share:
            beam = [sets[int(shares.least.argmax())]]
            break
    return beam[0], seen


def _cuts(worth_A: np.ndarray, set_A: np.ndarray, n: int) -> np.ndarray:
    """The set without its n members of the least worth."""
    return top(worth_A, int(set_A.sum()) - n, set_A)


def _without(set_A: np.ndarray, chosen_A: np.ndarray) -> list[np.ndarray]:
    """The set without each of the chosen members."""
    return [set_A & ~one for one in np.eye(len(set_A), dtype=bool)[chosen_A]]


def _prune(player: _Player, set_A: np.ndarray, share: float | None) -> np.ndarray:
    """Take out what adds nothing, as much at a time as the measures allow.

    Args:
      player: measures.
      set_A: to be pruned.
      share: that both must still reach; None: the score may fall by `LOSS` of it.
    """
    start = float(player.measure([set_A])[1].score[0])
    floor = start - LOSS * abs(start)
    for _ in range(ROUNDS):
        n = int(set_A.sum())
        if n < 2:
            break
        worth_A = player.worth(set_A)
        sizes = {int(np.ceil(n * x)) for x in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)}
        tried = [_cuts(worth_A, set_A, m) for m in sorted({1, *sizes}) if m < n]
        if n <= ALONE:
            tried += _without(set_A, set_A)
        else:
            tried += _without(set_A, top(-worth_A, TRIES // 2, set_A))
        sets, shares = player.measure(tried)
        left_B = np.array([one.sum() for one in sets])
        good_B = (shares.score if share is None else shares.least) >= (
            floor if share is None else share
        )
        if not good_B.any():
            break
        small_B = good_B & (left_B == left_B[good_B].min())
        set_A = sets[int(np.where(small_B, shares.score, -np.inf).argmax())]
    return set_A


def _down_to(player: _Player, set_A: np.ndarray, size: int) -> np.ndarray:
    """Take out the least until a size is reached, of several ways the best."""
    while (n := int(set_A.sum())) > size:
        step = 1 if n <= TRIES else max(1, min(n - size, n // 8))
        worth_A = player.worth(set_A)
        tried = [_cuts(rank_A, set_A, step) for rank_A in (worth_A, *player.rankings)]
        if step == 1:
            tried += _without(set_A, set_A)
        sets, shares = player.measure(tried)
        set_A = sets[int(shares.score.argmax())]
    return set_A


def _swap(player: _Player, set_A: np.ndarray) -> np.ndarray:
    """Exchange the members of least worth for others of more, while that helps."""
    k, n = int(set_A.sum()), len(set_A)
    if not 0 < k < n:
        return set_A
    _, now = player.measure([set_A])
    for _ in range(SWAPS):
        worth_A = player.worth(set_A)
        sizes = {1, *(int(np.ceil(k * x)) for x in (0.03, 0.1, 0.25))}
        tried = [
            _cuts(worth_A, set_A, m) | top(worth_A, m, ~set_A)
            for m in sorted(sizes)
            if m <= min(k, n - k)
        ]
        if k <= TRIES:
            others = np.eye(n, dtype=bool)[top(worth_A, max(1, PAIRS // k), ~set_A)]
            tried += [one | new for one in _without(set_A, set_A) for new in others]
        sets, shares = player.measure(tried)
        best = int(shares.score.argmax())
        if not shares.score[best] > now.score[0]:
            break
        set_A, now = sets[best], Shares(*(x[best : best + 1] for x in shares))
    return set_A
