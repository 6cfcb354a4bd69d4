"""Questions to a judge: whose text is this (Sort eval), which sentence (Contrastive).

Sort eval: the strongest excerpts of two features are shown, and one more text on which
exactly one of them is active; which one? Contrastive eval: the excerpts of one feature
are shown, and two sentences that differ in one concept, on exactly one of which it is
active; which one? (Circuit Tracing 2025, section 5.1.2; maths 18.7, 18.8.) By chance
half of the answers are right.

Everything here is a function of its arguments and a key: the same trials come out of
the same examples, and the first n of more trials are the n trials.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxclt.dashboards.examples import Examples, Excerpts, Shown
from jaxclt.evaluation.concepts import ConceptPair
from jaxclt.files.json_text import to_json

__all__ = ["Source", "Trial", "contrastive_trials", "sort_trials"]

Feature = tuple[int, int]  # layer and index
_BLOCK = 256  # rows of random numbers drawn at a time
_ROWS = 1024  # features whose cosines with all others are held at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One question with two possible answers, and all that it was made of.

    Attributes:
      kind: of the question.
      features: two for sort, called "1" and "2" in this order; one for contrastive.
      shown: excerpts of each of `features`, strongest first.
      query: tokens of the one text in question for sort; for contrastive those of the
        sentences "1" and "2".
      answer: the right one, 1 or 2.
      weight: activation on the sentence, for contrastive.
      similar: whether the two features were chosen because they are alike.
      cosine: of the directions of such features.
      window: window of the text that the query of a sort trial is from.
      concept: in which the sentences differ.
    """

    kind: Literal["sort", "contrastive"]
    features: tuple[Feature, ...]
    shown: tuple[tuple[Shown, ...], ...]
    query: tuple[tuple[str, ...], ...]
    answer: Literal[1, 2]
    weight: float = 1.0
    similar: bool = False
    cosine: float | None = None
    window: int = -1
    concept: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return dataclasses.asdict(self) | {
            "shown": [[shown._asdict() for shown in each] for each in self.shown]
        }

    @property
    def key(self) -> str:
        """Tells trials apart by all they hold."""
        text = to_json(self.as_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Source:
    """Excerpts of features as trials show them, made once each.

    Args:
      examples: what the features did on text.
      token_strings: of every token id.
      n_shown: excerpts shown of each feature; features with fewer do not take part.
      context: tokens of an excerpt at most, about its peak.
    """

    def __init__(
        self,
        examples: Examples,
        token_strings: Sequence[str],
        *,
        n_shown: int = 5,
        context: int = 32,
    ) -> None:
        self.examples, self.strings = examples, token_strings
        self.n_shown, self.context = n_shown, context
        self._shown: dict[int, tuple[Shown, ...]] = {}
        self._held: dict[int, list[Shown]] = {}

    def name(self, u: int) -> Feature:
        """Layer and index of a row of the examples."""
        return int(self.examples.layer_U[u]), int(self.examples.feature_U[u])

    def text(self, ids: Sequence[int]) -> list[str]:
        """Strings of tokens."""
        return [self.strings[int(i)] for i in ids]

    def able(self, *, held_out: bool) -> np.ndarray:
        """Rows of the features with enough excerpts to show, and maybe one more."""
        top, drawn = self.examples.top.window_UE, self.examples.drawn.window_UE
        able_U = (top >= 0).sum(1) >= self.n_shown
        if held_out:
            first_U1E = np.where(top < 0, -2, top)[:, None, : self.n_shown]
            other_U = ((drawn >= 0) & (drawn[:, :, None] != first_U1E).all(2)).any(1)
            able_U &= ((top >= 0).sum(1) > self.n_shown) | other_U
        return np.flatnonzero(able_U)

    def shown(self, u: int) -> tuple[Shown, ...]:
        """The excerpts that stand for a feature, strongest first."""
        if u not in self._shown:
            top = self.examples.top
            self._shown[u] = tuple(
                self.excerpt(top, u, e) for e in _rows(top, u)[: self.n_shown]
            )
        return self._shown[u]

    def held(self, u: int) -> list[Shown]:
        """Excerpts of other windows, with other words, than the shown ones."""
        if u not in self._held:
            top, drawn = self.examples.top, self.examples.drawn
            places = [(top, e) for e in _rows(top, u)[self.n_shown :]]
            places += [(drawn, e) for e in _rows(drawn, u)]
            windows = {shown.window for shown in self.shown(u)}
            texts = {shown.tokens for shown in self.shown(u)}
            kept = []
            for excerpts, e in places:
                window = int(excerpts.window_UE[u, e])
                if window not in windows:
                    windows.add(window)
                    shown = self.excerpt(excerpts, u, e)
                    if shown.tokens not in texts:
                        kept.append(shown)
            self._held[u] = kept
        return self._held[u]

    def excerpt(self, excerpts: Excerpts, u: int, e: int) -> Shown:
        """One of the excerpts of a feature, `context` tokens at most."""
        whole, context = self.examples.shown(excerpts, u, e, self.text), self.context
        # What a causal feature reacts to stands before its peak: most room is there.
        low = max(0, min(whole.peak - 2 * context // 3, len(whole.tokens) - context))
        cut = slice(low, low + context)
        acts = tuple(map(_short, whole.acts[cut]))
        return Shown(whole.window, whole.tokens[cut], acts, whole.peak - low)


def _rows(excerpts: Excerpts, u: int) -> list[int]:
    return np.flatnonzero(excerpts.window_UE[u] >= 0).tolist()


def sort_trials(
    source: Source,
    n: int,
    key: jax.Array,
    *,
    direction_UD: np.ndarray | None = None,
) -> list[Trial]:
    """Up to n trials of the Sort eval, each of another pair of features.

    The query is an excerpt that is not shown: from further down `Examples.top` or from
    `Examples.drawn`, of another window and text than the shown ones, in whose window
    the other feature is not active anywhere. A pair without such an excerpt is passed
    over: two identical features have none.

    Args:
      source: of excerpts.
      n: trials; fewer come back if there are not enough pairs.
      key: decides the pairs, whose excerpt the query is, which, and who is "1".
      direction_UD: a direction for each feature, such as its decoder. Given, pairs are
        not drawn but taken by the cosine of their directions, highest first.
    """
    able_E = source.able(held_out=True)
    if len(able_E) < 2 or n < 1:
        return []
    key_pairs, key_rest = jax.random.split(key)
    if direction_UD is None:
        pairs = ((u, v, None) for u, v in _random_pairs(able_E, key_pairs, n))
    else:
        pairs = _similar_pairs(able_E, direction_UD, n)
    found: list[Trial] = []
    for (u, v, cosine), draw in zip(pairs, _draws(key_rest, 3), strict=False):
        trial = _sort_trial(source, (u, v), draw)
        if trial is not None:
            if cosine is not None:
                trial = dataclasses.replace(trial, similar=True, cosine=cosine)
            found.append(trial)
            if len(found) == n:
                break
    return found


def contrastive_trials(
    source: Source,
    pairs: Sequence[ConceptPair],
    peak_P2U: np.ndarray,
    n: int,
    key: jax.Array,
    *,
    encode: Callable[[str], Sequence[int]],
) -> list[Trial]:
    """Up to n trials of the Contrastive eval, no feature twice on a pair of sentences.

    Drawn with equal chances among all features and pairs where the feature is active on
    exactly one of the sentences.

    Args:
      source: of excerpts.
      pairs: P pairs of sentences.
      peak_P2U: largest activation of each feature on both sentences of each pair, the
        one with the concept first; 0 where it is not active (see `sentence_peaks`).
      n: trials; fewer come back if there are not enough.
      key: decides which, and the order of the sentences.
      encode: token ids of a text, without special tokens.
    """
    able_E = source.able(held_out=False)
    on_P2E = peak_P2U[:, :, able_E] != 0
    pair_N, index_N = np.nonzero(on_P2E[:, 0] != on_P2E[:, 1])
    key_order, key_sides = jax.random.split(key)
    if not len(pair_N) or n < 1:
        return []
    order_N = np.asarray(jax.random.permutation(key_order, len(pair_N)))[:n]
    found = []
    for i, (side,) in zip(order_N.tolist(), _draws(key_sides, 1), strict=False):
        p, u = int(pair_N[i]), int(able_E[index_N[i]])
        exchanged = bool(side < 0.5)
        query = tuple(tuple(source.text(encode(x))) for x in pairs[p].sentences)
        first_is_on = bool(peak_P2U[p, 0, u] != 0)
        found.append(
            Trial(
                kind="contrastive",
                features=(source.name(u),),
                shown=(source.shown(u),),
                query=query[::-1] if exchanged else query,
                answer=1 if first_is_on != exchanged else 2,
                # Neurons of some dictionaries count when they are negative.
                weight=_short(abs(float(peak_P2U[p, :, u].sum()))),
                concept=pairs[p].concept,
            )
        )
    return found


def _sort_trial(
    source: Source, pair: tuple[int, int], draw: np.ndarray
) -> Trial | None:
    """The trial of a pair; three uniform numbers decide side, query and order."""
    sides = (0, 1) if draw[0] < 0.5 else (1, 0)
    for side in sides:
        other = pair[1 - side]
        apart = [
            shown
            for shown in source.held(pair[side])
            if not source.examples.fired(other, shown.window)
        ]
        if not apart:
            continue
        query = apart[int(draw[1] * len(apart))]
        order = (0, 1) if draw[2] < 0.5 else (1, 0)
        return Trial(
            kind="sort",
            features=tuple(source.name(pair[i]) for i in order),
            shown=tuple(source.shown(pair[i]) for i in order),
            query=(query.tokens,),
            answer=1 if order[0] == side else 2,
            window=query.window,
        )
    return None


def _draws(key: jax.Array, columns: int) -> Iterator[np.ndarray]:
    """Rows of numbers in [0, 1) without end; how many are taken changes none."""
    for i in itertools.count():
        part = jax.random.fold_in(key, i)
        # float32 holds no number between 1 - 2^-24 and 1: rows of float64 stay below 1.
        yield from np.asarray(jax.random.uniform(part, (_BLOCK, columns)), np.float64)


def _random_pairs(
    able_E: np.ndarray, key: jax.Array, n: int
) -> Iterator[tuple[int, int]]:
    """Pairs of different rows, none twice; ends when new ones are hard to find."""
    E, seen = len(able_E), set()
    # Of a million pairs those that give no trial can be the most: do not search on.
    for draw in itertools.islice(_draws(key, 2), 1000 + 50 * n):
        i = int(draw[0] * E)
        j = (i + 1 + int(draw[1] * (E - 1))) % E
        pair = (min(i, j), max(i, j))
        if pair not in seen:
            seen.add(pair)
            yield int(able_E[pair[0]]), int(able_E[pair[1]])


def _similar_pairs(
    able_E: np.ndarray, direction_UD: np.ndarray, n: int
) -> Iterator[tuple[int, int, float]]:
    """Pairs by the cosine of their directions, highest first, among near neighbours."""
    unit_ED = np.asarray(direction_UD, np.float32)[able_E]
    norm_E1 = np.linalg.norm(unit_ED, axis=1, keepdims=True)
    unit_ED = unit_ED / np.where(norm_E1 > 0, norm_E1, 1)
    E = len(able_E)
    near = min(E - 1, max(8, -(-4 * n // E)))
    best: dict[tuple[int, int], float] = {}
    for start in range(0, E, _ROWS):
        cosine_RE = unit_ED[start : start + _ROWS] @ unit_ED.T
        rows = np.arange(len(cosine_RE))
        cosine_RE[rows, start + rows] = -np.inf
        for r, to in enumerate(np.argpartition(-cosine_RE, near - 1)[:, :near]):
            for j in to.tolist():
                pair = (min(start + r, j), max(start + r, j))
                best.setdefault(pair, float(cosine_RE[r, j]))
    for i, j in sorted(best, key=lambda pair: (-best[pair], pair)):
        yield int(able_E[i]), int(able_E[j]), _short(best[i, j])


def _short(x: float) -> float:
    """Four digits: all that is read, and logs stay small."""
    return float(f"{x:.4g}")
