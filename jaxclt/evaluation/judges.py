"""Judges that need no model: the protocol, one that knows, a coin, and word counts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from jaxclt.dashboards.examples import Examples, Shown
from jaxclt.evaluation.trials import Trial
from jaxclt.files.json_text import to_json

__all__ = [
    "Answer",
    "Background",
    "BaselineJudge",
    "Choice",
    "CoinJudge",
    "Judge",
    "OracleJudge",
    "background_of",
    "better",
]

Choice = Literal[1, 2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a judge said to one trial.

    Attributes:
      choice: None where the judge gave no answer that could be understood.
      text: its words, as evidence.
      scores: of "1" and "2", for judges that compare numbers.
      from_cache: whether nothing had to be asked for it.
      usage: tokens that it cost (``prompt_tokens``, ``completion_tokens``,
        ``requests``).
      not_asked: why the judge was not asked at all, or None if it was.
    """

    choice: Choice | None
    text: str = ""
    scores: tuple[float, float] | None = None
    from_cache: bool = False
    usage: Mapping[str, int] = dataclasses.field(default_factory=dict)
    not_asked: str | None = None


class Judge(Protocol):
    """Who answers trials."""

    @property
    def name(self) -> str:
        """Tells judges apart in logs."""
        ...

    def judge(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Answer]]:
        """Answers with the number of their trial, as they come, in any order."""
        ...


@dataclasses.dataclass(frozen=True)
class OracleJudge:
    """Knows the right answers: its score is 1, or the evaluation is wrong."""

    name: str = "oracle"

    def judge(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Answer]]:
        """The right answers."""
        for i, trial in enumerate(trials):
            yield i, Answer(choice=trial.answer)


@dataclasses.dataclass(frozen=True)
class CoinJudge:
    """Tosses a coin for each trial, the same way for the same trial."""

    seed: int = 0

    @property
    def name(self) -> str:
        """With the seed."""
        return f"coin:{self.seed}"

    def judge(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Answer]]:
        """Answers that have nothing to do with the question."""
        for i, trial in enumerate(trials):
            toss = hashlib.sha256(f"{self.seed} {trial.key}".encode()).digest()[0]
            yield i, Answer(choice=1 if toss % 2 else 2)


@dataclasses.dataclass(frozen=True)
class Background:
    """How frequent words are in the text at large."""

    share: Mapping[str, float]
    floor: float  # share of a word that was not seen

    def __call__(self, word: str) -> float:
        """Share of a word, never 0."""
        return self.share.get(word, self.floor)


def background_of(examples: Examples, token_strings: Sequence[str]) -> Background:
    """Shares of words in the text of the examples."""
    ids, counts = np.unique(
        examples.token_WS[examples.token_WS >= 0], return_counts=True
    )
    total: Counter[str] = Counter()
    for i, count in zip(ids, counts, strict=True):
        total[_word(token_strings[int(i)])] += int(count)
    return _shares(total)


@dataclasses.dataclass(frozen=True)
class BaselineJudge:
    """Naive Bayes over words, weighted by activation: what needs no understanding.

    A feature's words are those of its excerpts, each counted by its activation relative
    to the excerpt's largest, and a little in any case, since the words around a peak
    tell the topic. With q the share of a word among them, smoothed by the background b,
    a text gets ``sum over its words of log(1 - m + m q/b)``, the log-likelihood ratio
    of text with a share m of the feature's words to text without.

    Attributes:
      background: shares of words at large; None takes the words of the trial itself.
      mixture: m.
      smoothing: background words added to the feature's own.
      around: least weight of a word in an excerpt.
    """

    background: Background | None = None
    mixture: float = 0.3
    smoothing: float = 1.0
    around: float = 0.05

    @property
    def name(self) -> str:
        """Says which background there is."""
        return "baseline" if self.background else "baseline:trial"

    def judge(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Answer]]:
        """The feature, or the sentence, with the larger ratio."""
        for i, trial in enumerate(trials):
            known = self.background or _own_background(trial)
            # Sort: two features and one text; Contrastive: one feature and two texts.
            first, second = itertools.product(trial.shown, trial.query)
            scores = self.ratio(*first, known), self.ratio(*second, known)
            choice = better(scores, trial)
            yield i, Answer(choice=choice, scores=scores)

    def ratio(
        self, shown: Sequence[Shown], text: Sequence[str], background: Background
    ) -> float:
        """Log-likelihood ratio of a text under the words of excerpts."""
        count: dict[str, float] = {}
        for excerpt in shown:
            largest = max(map(abs, excerpt.acts), default=0.0) or 1.0
            for token, act in zip(excerpt.tokens, excerpt.acts, strict=True):
                word = _word(token)
                weight = max(abs(act) / largest, self.around)
                count[word] = count.get(word, 0.0) + weight
        total = sum(count.values()) + self.smoothing
        # Equal sums must be equal whatever order the words stand in.
        ratios = []
        for word in map(_word, text):
            b = background(word)
            q = (count.get(word, 0.0) + self.smoothing * b) / total
            ratios.append(np.log1p(self.mixture * (q / b - 1)))
        return float(f"{sum(sorted(ratios)):.9g}")


def better(scores: tuple[float, float], trial: Trial) -> Choice | None:
    """Which score is larger.

    A tie is decided by what the two sides hold, so that the same side wins in either
    order; sides that hold the same have no answer.
    """
    if scores[0] != scores[1]:
        return 1 if scores[0] > scores[1] else 2
    first, second = _sides(trial)
    if first == second:
        return None
    return 1 if first > second else 2


def _sides(trial: Trial) -> tuple[str, str]:
    """A hash of what is "1" and of what is "2", together with what both share."""
    if trial.kind == "sort":
        sides, shared = trial.shown, trial.query
    else:
        sides, shared = trial.query, trial.shown
    first, second = (
        hashlib.sha256(to_json([side, shared]).encode()).hexdigest() for side in sides
    )
    return first, second


def _own_background(trial: Trial) -> Background:
    texts = [excerpt.tokens for each in trial.shown for excerpt in each]
    total = Counter(_word(t) for text in (*texts, *trial.query) for t in text)
    return _shares(total)


def _shares(total: Counter[str]) -> Background:
    # Laplace's rule: every word is seen once more, and so is one that was not seen.
    n = total.total() + len(total) + 1
    return Background({word: (c + 1) / n for word, c in total.items()}, 1 / n)


def _word(token: str) -> str:
    """A token without case and the space before it; white space stays what it is."""
    return token.strip().lower() or token
