"""Rows, logs and scores, and both evals of a dictionary from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_cases import SHOWN, make_examples, planted, source, trial_of

from jaxclt.clt.coder import load
from jaxclt.dashboards.stream import ExampleOptions, gather_examples
from jaxclt.errors import InputError
from jaxclt.evaluation.concepts import ConceptPair
from jaxclt.evaluation.http_client import ClientOptions
from jaxclt.evaluation.http_judge import HttpJudge
from jaxclt.evaluation.judges import (
    Answer,
    BaselineJudge,
    CoinJudge,
    OracleJudge,
)
from jaxclt.evaluation.judging import (
    Questions,
    interpretability,
    judge_score,
    judge_trials,
    read_judge,
)
from jaxclt.evaluation.local_judge import LocalJudge
from jaxclt.evaluation.trials import Trial, sort_trials
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.model import load_model
from jaxclt.text.windows import read_windows
from jaxclt.validation.stats import wilson

KEY = jax.random.key(0)
GOLDENS = Path(__file__).parents[1] / "goldens"


def trials_of(n: int) -> list[Trial]:
    return sort_trials(source(planted()), n, KEY)


class Counting:
    """The coin, which notes what it is asked and stops after some."""

    name = "counting"

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.asked = most, []

    def judge(self, trials):
        for i, answer in CoinJudge().judge(trials):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(trials[i].key)
            yield i, answer


@settings(deadline=None, max_examples=10, derandomize=True)
@given(cuts=st.lists(st.integers(0, 6), max_size=4), torn=st.integers(0, 100))
def test_interrupted_runs_add_up_to_one(tmp_path_factory, cuts, torn):
    log = tmp_path_factory.mktemp("log") / "deep" / "log.jsonl"
    trials = TRIALS[:12]
    asked = []
    for most in cuts:
        judge = Counting(most)
        with contextlib.suppress(KeyboardInterrupt):
            judge_trials(judge, trials, log=log)
        asked += judge.asked
    assert len(asked) == len(set(asked))
    lost = 0
    if log.exists():  # the machine went down while a line was written
        whole = log.read_bytes()
        log.write_bytes(whole[: len(whole) - torn] if torn < len(whole) else whole)
        lost = torn
    judge, seen = Counting(), []
    rows = judge_trials(
        judge, trials, log=log, on_trial=lambda done, total: seen.append((done, total))
    )
    if not lost:
        assert sorted(asked + judge.asked) == sorted(t.key for t in trials)
    assert rows == judge_trials(Counting(), trials)
    assert seen[-1] == (12, 12)
    assert [trial_of(row["trial"]) for row in rows] == trials
    again = Counting()
    assert judge_trials(again, trials, log=log) == rows
    assert again.asked == []


TRIALS = trials_of(20)


def test_the_same_trial_is_asked_once():
    judge = Counting()
    rows = judge_trials(judge, [*TRIALS[:3], *TRIALS[:3]])
    assert len(judge.asked) == 3
    assert rows[:3] == rows[3:]


def test_each_judge_is_asked_itself(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    first = judge_trials(OracleJudge(), TRIALS, log=log)
    second = judge_trials(CoinJudge(1), TRIALS, log=log)
    assert first != second
    assert judge_trials(OracleJudge(), TRIALS, log=log) == first
    assert len(log.read_text().splitlines()) == 40


def test_a_log_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot"):
        judge_trials(OracleJudge(), TRIALS, log=tmp_path / "file" / "log.jsonl")


def rows_of(hits, weights, *, kind="sort", concepts=None, features=None):
    rows = []
    for i, (hit, weight) in enumerate(zip(hits, weights, strict=True)):
        name = (0, i if features is None else features[i])
        trial = Trial(
            kind=kind,
            features=(name, (9, i)) if kind == "sort" else (name,),
            shown=(),
            query=(),
            answer=1,
            weight=weight,
            concept="" if concepts is None else concepts[i],
        )
        row = {"trial": trial.as_json(), "correct": hit}
        rows.append(row | {"answer": dataclasses.asdict(Answer(choice=1))})
    return json.loads(json.dumps(rows))


def test_scores_of_known_rows():
    rows = rows_of([True, True, False, None], [3.0, 1.0, 4.0, 100.0])
    score = judge_score(rows, KEY)
    assert score["accuracy"] == pytest.approx(2 / 3)
    assert score["interval"] == pytest.approx(list(wilson(2, 3)))
    assert (score["n"], score["unanswered"], score["not_asked"]) == (3, 1, 0)
    assert (score["unit"], score["clusters"], score["stopped"]) == ("feature", 3, None)
    weighted = judge_score(rows, KEY, weighted=True)
    assert weighted["accuracy"] == 0.5
    assert weighted["interval"] == weighted["interval_clustered"] == [0, 1]
    assert judge_score(rows, KEY) == score
    json.dumps(score, allow_nan=False)


def test_nothing_answered_is_no_score():
    for rows in ([], rows_of([None], [1.0])):
        for weighted in (False, True):
            score = judge_score(rows, KEY, weighted=weighted)
            assert score["accuracy"] is score["interval"] is None
            assert score["n"] == 0
            json.dumps(score, allow_nan=False)


def test_trials_that_hang_together_count_less():
    hits = [True] * 40 + [False] * 40
    spread = rows_of(hits, [1.0] * 80)
    pairs = ["a"] * 40 + ["b"] * 40
    tied = rows_of(hits, [1.0] * 80, kind="contrastive", concepts=pairs)
    ones = judge_score(spread, KEY)["interval_clustered"]
    low, high = judge_score(spread, KEY)["interval"]
    assert ones == pytest.approx([low, high], abs=0.03)
    score = judge_score(tied, KEY)
    assert (score["unit"], score["clusters"]) == ("pair", 2)
    assert score["interval_clustered"] == [0, 1]
    one = rows_of(hits, [1.0] * 80, features=[0] * 80)
    assert judge_score(one, KEY)["interval_clustered"] is None


def test_judges_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert isinstance(read_judge("baseline"), BaselineJudge)
    assert isinstance(read_judge("coin"), CoinJudge)
    assert isinstance(read_judge("oracle"), OracleJudge)
    golden = GOLDENS / "circuit_tracer_clt" / "model"
    assert isinstance(read_judge(f"local:{golden}"), LocalJudge)
    options = ClientOptions(cache_dir=tmp_path)
    judge = read_judge("http://127.0.0.1:9/v1/#some/model:7b", options)
    assert isinstance(judge, HttpJudge)
    assert judge.name == "http://127.0.0.1:9/v1#some/model:7b"
    judge.client.close()
    for bad in ("", "gpt", "local:", "coin:x", "http://x/v1", "https://#m"):
        with pytest.raises(InputError) as error:
            read_judge(bad)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no model"):
        read_judge("local:nowhere")


@pytest.fixture(scope="module")
def golden():
    model = load_model(GOLDENS / "circuit_tracer_clt" / "model")
    path = str(GOLDENS / "circuit_tracer_clt" / "dictionary")
    return model, load(load_dictionary(path, model), model.params, model.cfg)


PAIRS = [
    ConceptPair(f"c{i}", (f"w{i} w{i + 1} w{i + 2}", f"w{i + 9} w{i + 7} w{i + 4}"))
    for i in range(3, 40, 4)
]


def evaluate(golden, judge, folder, seed=0, **more):
    model, encoder = golden
    examples = planted(12, seed=1)
    more = {"directions_UD": np.asarray(jax.random.normal(KEY, (12, 4)))} | more
    questions = Questions(
        sort=20, contrastive=30, pairs=PAIRS, seed=seed, n_shown=SHOWN
    )
    return interpretability(
        judge, examples, encoder, model, questions, log_dir=folder, **more
    )


def test_both_evals_from_end_to_end(golden, tmp_path: Path):
    """Maths 18.9 and 18.12 on a model, a dictionary and sentences."""
    found = evaluate(golden, OracleJudge(), tmp_path)
    names = {"sort", "sort_similar", "contrastive", "contrastive_weighted"}
    assert set(found) == {"judge", *names}
    for name in names:
        assert found[name]["accuracy"] == 1, name
        assert found[name]["n"] > 5
        assert found[name]["interval"][1] == 1
    json.dumps(found, allow_nan=False)
    logs = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(logs) == {"sort.jsonl", "sort_similar.jsonl", "contrastive.jsonl"}
    assert evaluate(golden, OracleJudge(), tmp_path) == found
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == logs
    other = tmp_path / "other"
    evaluate(golden, OracleJudge(), other, seed=1)
    assert (other / "sort.jsonl").read_bytes() != logs["sort.jsonl"]
    for line in logs["contrastive.jsonl"].splitlines():
        trial = trial_of(json.loads(line)["trial"])
        assert all(token.startswith("w") for text in trial.query for token in text)


def test_words_do_better_than_chance_on_planted_features(golden):
    found = evaluate(golden, BaselineJudge(), None, directions_UD=None)
    assert found["judge"] == "baseline"  # it was given the words of the examples
    assert found["sort"]["accuracy"] > 0.8
    assert found["sort_similar"]["n"] == 0


def test_on_examples_of_a_pass_over_text(golden):
    """Maths 18.9 on features as they are: many fire often, and queries are rare."""
    model, encoder = golden
    token_WS = np.asarray(jax.random.randint(KEY, (150, 12), 3, 97))
    windows = read_windows(model, list(token_WS))
    examples = gather_examples(
        model.params, encoder, windows, ExampleOptions(top=6, drawn=6, excerpt=6)
    )
    questions = Questions(
        sort=30, contrastive=60, pairs=PAIRS, n_shown=SHOWN, context=5
    )
    W_enc_LFD = np.asarray(encoder.weights.enc.W_enc_FD)
    found = {
        judge.name: interpretability(
            judge,
            examples,
            encoder,
            model,
            questions,
            directions_UD=W_enc_LFD.reshape(len(examples.layer_U), -1),
        )
        for judge in (OracleJudge(), CoinJudge())
    }
    for name in ("sort", "sort_similar", "contrastive", "contrastive_weighted"):
        assert found["oracle"][name]["accuracy"] == 1, name
        low, high = found["coin:0"][name]["interval_clustered"]
        assert low < 0.7
        assert high > 0.3
    assert found["oracle"]["contrastive"]["n"] == 60
    assert found["oracle"]["contrastive"]["unit"] == "pair"


def test_features_without_examples_have_no_score(golden):
    model, encoder = golden
    token_WS = planted().token_WS
    silent = make_examples([set(), set()], token_WS)
    questions = Questions(sort=5, contrastive=5, pairs=PAIRS[:2])
    found = interpretability(OracleJudge(), silent, encoder, model, questions)
    assert found["sort"]["accuracy"] is found["contrastive"]["accuracy"] is None
