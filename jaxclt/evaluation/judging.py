"""Running judges, with a log that a killed run goes on from, and their scores."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclt.clt.coder import Loaded
from jaxclt.dashboards.examples import Examples
from jaxclt.errors import InputError, did_you_mean, shown
from jaxclt.evaluation.concepts import ConceptPair, sentence_peaks
from jaxclt.evaluation.http_client import Client, ClientOptions
from jaxclt.evaluation.http_judge import HttpJudge
from jaxclt.evaluation.judges import (
    Answer,
    BaselineJudge,
    CoinJudge,
    Judge,
    OracleJudge,
    background_of,
)
from jaxclt.evaluation.local_judge import LocalJudge
from jaxclt.evaluation.trials import Source, Trial, contrastive_trials, sort_trials
from jaxclt.files.json_file import COUNT, TEXT, json_schema, named, record
from jaxclt.files.json_text import to_json
from jaxclt.io.model import Model, load_model
from jaxclt.runs.kept import Answers
from jaxclt.validation.stats import ratio_interval, wilson

__all__ = [
    "Questions",
    "Row",
    "interpretability",
    "judge_score",
    "judge_trials",
    "read_judge",
]

Row = dict[str, Any]  # key, judge, trial, answer, correct: JSON throughout
_LOGGED = json_schema(
    record(
        {
            "key": TEXT,
            "judge": TEXT,
            "correct": {"type": ["boolean", "null"]},
            "answer": record(
                {"not_asked": {"type": ["string", "null"]}, "usage": named(COUNT)}
            ),
        }
    )
)


def judge_trials(
    judge: Judge,
    trials: Sequence[Trial],
    *,
    log: str | os.PathLike[str] | None = None,
    on_trial: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """What a judge says to trials, each with its evidence.

    Args:
      judge: who answers.
      trials: what is asked; the same trial twice is asked once.
      log: a .jsonl file that every answer is added to as it comes. Trials that this
        judge has answered there are not asked again, so that a run that was killed
        goes on where it was. Trials that were not asked are not in it.
      on_trial: progress: answers there are, of how many.

    Returns:
      A row for each trial, in their order.

    Raises:
      InputError: if the log cannot be read or written, or the judge cannot answer.
    """
    kept = Answers(
        None if log is None else Path(log), _LOGGED, itemgetter("judge", "key")
    )
    asked = {trial.key: trial for trial in trials}
    found: dict[str, Row] = {}
    for key, trial in asked.items():
        if row := kept.get((judge.name, key)):
            found[key] = row | {"trial": _plain(trial.as_json())}
    left = [trial for key, trial in asked.items() if key not in found]
    done, total = len(found), len(asked)
    on_trial(done, total)
    for i, answer in judge.judge(left):
        key = left[i].key
        found[key] = row = _row(judge.name, key, left[i], answer)
        if answer.not_asked is None:
            kept.add((judge.name, key), row)
            done += 1
            on_trial(done, total)
    return [found[trial.key] for trial in trials]


def _row(judge: str, key: str, trial: Trial, answer: Answer) -> Row:
    choice = answer.choice
    row = {
        "key": key,
        "judge": judge,
        "correct": None if choice is None else choice == trial.answer,
        "answer": dataclasses.asdict(answer),
        "trial": trial.as_json(),
    }
    return _plain(row)


def _plain(row: Row) -> Row:
    """The same whether it comes from the log or not: lists, no tuples."""
    return json.loads(to_json(row))


def judge_score(
    rows: Sequence[Row], key: jax.Array, *, weighted: bool = False
) -> dict[str, Any]:
    """Share of right answers among the trials that were answered.

    Args:
      rows: from `judge_trials`, all of one kind.
      key: of the bootstrap.
      weighted: count each trial by its weight, the activation of the feature.

    Returns:
      ``accuracy``; ``interval``, 95% by Wilson's formula, which takes trials for
      independent (with weights: the next one); ``interval_clustered``, the same by a
      bootstrap of whole ``unit``: trials that share the feature in question, or where
      those are fewer the pair of sentences; ``n`` trials answered; ``clusters``;
      ``unanswered`` without a decision; ``not_asked`` and why (``stopped``); ``usage``
      in tokens and requests. None stands for what there is too little for.
    """
    answered = [row for row in rows if row["correct"] is not None]
    skipped = [row for row in rows if row["answer"]["not_asked"] is not None]
    hit_N = np.array([row["correct"] for row in answered], np.float64)
    weight_N = np.array(
        [row["trial"]["weight"] if weighted else 1.0 for row in answered], np.float64
    )
    unit, name_N = _units(answered)
    _, cluster_N = np.unique(name_N, return_inverse=True)
    top_C = np.bincount(cluster_N, hit_N * weight_N)
    bottom_C = np.bincount(cluster_N, weight_N)
    clustered = ratio_interval(top_C, bottom_C, key)
    plain = clustered if weighted else wilson(int(hit_N.sum()), len(hit_N))
    total = bottom_C.sum()
    usage: collections.Counter[str] = collections.Counter()
    for row in rows:
        usage.update(row["answer"]["usage"])
    return {
        "accuracy": float(top_C.sum() / total) if total > 0 else None,
        "interval": _finite(plain),
        "interval_clustered": _finite(clustered),
        "unit": unit,
        "clusters": len(top_C),
        "n": len(answered),
        "unanswered": len(rows) - len(answered) - len(skipped),
        "not_asked": len(skipped),
        "stopped": skipped[0]["answer"]["not_asked"] if skipped else None,
        "usage": dict(usage),
    }


def _units(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What trials have in common that makes them depend on each other."""
    trials = [row["trial"] for row in rows]
    feature = [
        str(t["features"][t["answer"] - 1 if t["kind"] == "sort" else 0])
        for t in trials
    ]
    concept = [t["concept"] for t in trials]
    if all(concept) and len(set(concept)) < len(set(feature)):
        return "pair", concept
    return "feature", feature


def _finite(interval: tuple[float, float]) -> list[float] | None:
    return list(interval) if np.isfinite(interval).all() else None


def read_judge(text: str, options: ClientOptions | None = None) -> Judge:
    """A judge from what a user wrote.

    Args:
      text: ``baseline``, ``coin``, ``oracle``, ``local:MODEL`` (as `load_model` takes
        it), or ``http(s)://host/v1#model``, an OpenAI-compatible address and a model's
        name there.
      options: how an address is asked.

    Raises:
      InputError: for anything else, or what does not load.
    """
    if text.startswith(("http://", "https://")):
        url, _, model = text.partition("#")
        return HttpJudge(Client(url, model, options))
    kind, _, rest = text.partition(":")
    if kind == "local" and rest:
        return LocalJudge(load_model(rest))
    known: dict[str, Judge] = {
        "baseline": BaselineJudge(),
        "coin": CoinJudge(),
        "oracle": OracleJudge(),
    }
    if text not in known:
        raise InputError(
            f"judge {shown(text)} is unknown; use {', '.join(known)}, local:MODEL or "
            f"http(s)://host/v1#model{did_you_mean(text, known)}"
        )
    return known[text]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked about a dictionary's features."""

    sort: int  # trials of the Sort eval, and as many again of similar pairs
    contrastive: int  # trials of the Contrastive eval
    pairs: Sequence[ConceptPair] = ()  # of sentences, from `load_pairs`
    seed: int = 0  # of the trials and the bootstrap
    n_shown: int = 5  # excerpts shown of each feature
    context: int = 32  # tokens of an excerpt at most


def interpretability(
    judge: Judge,
    examples: Examples,
    loaded: Loaded,
    model: Model,
    questions: Questions,
    *,
    directions_UD: np.ndarray | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    on_trial: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Sort eval and Contrastive eval of a dictionary's features.

    Args:
      judge: from `read_judge`.
      examples: what the features did on text.
      loaded: the dictionary.
      model: whose stream it reads.
      questions: how many, of what.
      directions_UD: a direction for each feature, such as its decoder; without them
        there are no similar pairs.
      log_dir: folder for ``sort.jsonl``, ``sort_similar.jsonl``, ``contrastive.jsonl``
        with every trial and answer, to go on from; or None.
      on_trial: progress: name, answers there are, of how many.

    Returns:
      ``judge`` and, each as `judge_score` returns it, ``sort``, ``sort_similar``,
      ``contrastive`` and ``contrastive_weighted`` (the answers of ``contrastive``
      counted by activation).
    """
    pairs = questions.pairs
    words, sentences = _strings(examples, model, pairs)
    if isinstance(judge, BaselineJudge) and judge.background is None:
        judge = dataclasses.replace(judge, background=background_of(examples, words))
    key_sort, key_similar, key_contrastive, key_score = jax.random.split(
        jax.random.key(questions.seed), 4
    )
    source = Source(
        examples, words, n_shown=questions.n_shown, context=questions.context
    )
    trials = {
        "sort": sort_trials(source, questions.sort, key_sort),
        "sort_similar": [],
        "contrastive": [],
    }
    if directions_UD is not None:
        trials["sort_similar"] = sort_trials(
            source, questions.sort, key_similar, direction_UD=directions_UD
        )
    if questions.contrastive and pairs:
        trials["contrastive"] = contrastive_trials(
            source,
            pairs,
            sentence_peaks(loaded, model, pairs, examples.layer_U, examples.feature_U),
            questions.contrastive,
            key_contrastive,
            encode=sentences.__getitem__,
        )
    rows = {
        name: judge_trials(
            judge,
            some,
            log=None if log_dir is None else Path(log_dir) / f"{name}.jsonl",
            on_trial=partial(on_trial, name),
        )
        for name, some in trials.items()
    }
    found = {name: judge_score(some, key_score) for name, some in rows.items()}
    weighted = judge_score(rows["contrastive"], key_score, weighted=True)
    return {"judge": judge.name, **found, "contrastive_weighted": weighted}


def _strings(
    examples: Examples, model: Model, pairs: Sequence[ConceptPair]
) -> tuple[list[str], dict[str, list[int]]]:
    """Strings by token id, of those that occur, and the ids of the sentences."""
    tokenizer = model.tokenizer
    texts = [text for pair in pairs for text in pair.sentences]
    sentences = {text: tokenizer.encode(text, "never") for text in texts}
    used = {int(i) for i in np.unique(examples.token_WS) if i >= 0}
    used |= {i for ids in sentences.values() for i in ids}
    order = sorted(used)
    words = [""] * model.cfg.d_vocab
    for i, word in zip(order, tokenizer.token_strings(order), strict=True):
        words[i] = word
    return words, sentences
