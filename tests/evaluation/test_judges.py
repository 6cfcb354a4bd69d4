"""Judges without an API: maths 18.9, 18.10, and words and models that beat chance."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_cases import WORDS, planted, source, swapped

from jaxclt.dashboards.examples import Shown
from jaxclt.evaluation.concepts import ConceptPair
from jaxclt.evaluation.judges import (
    BaselineJudge,
    CoinJudge,
    OracleJudge,
    background_of,
)
from jaxclt.evaluation.judging import judge_score, judge_trials
from jaxclt.evaluation.local_judge import LocalJudge
from jaxclt.evaluation.trials import Trial, contrastive_trials, sort_trials
from jaxclt.io.model import load_model
from jaxclt.lm.run import forward
from jaxclt.validation.stats import wilson

KEY = jax.random.key(0)
GOLDENS = Path(__file__).parents[1] / "goldens"


def sort_of(n: int, features: int = 25) -> list[Trial]:
    return sort_trials(source(planted(features)), n, KEY)


def contrastive_of(n: int) -> list[Trial]:
    """Feature u fires on 2u: each sentence of pair p has the tokens of two features."""
    examples = planted(20)
    ids = [(4 * p, 4 * p + 1, 45, 46, 4 * p + 2, 47, 48, 49) for p in range(10)]
    pairs, peak_P2U = [], np.zeros((10, 2, 20), np.float32)
    for p, x in enumerate(ids):
        texts = (" ".join(map(str, x[:4])), " ".join(map(str, x[4:])))
        pairs.append(ConceptPair(f"c{p}", texts))
        for side, text in enumerate((x[:4], x[4:])):
            for i in text:
                if i // 2 < 20:
                    peak_P2U[p, side, i // 2] = 1 + p
    return contrastive_trials(
        source(examples),
        pairs,
        peak_P2U,
        n,
        KEY,
        encode=lambda text: [int(i) for i in text.split()],
    )


def accuracy(judge, trials) -> float:
    return judge_score(judge_trials(judge, trials), KEY)["accuracy"]


@pytest.fixture(scope="module")
def local() -> LocalJudge:
    model = load_model(GOLDENS / "circuit_tracer_clt" / "model")
    opening = dataclasses.replace(model.tokenizer, adds_bos=True)
    return LocalJudge(dataclasses.replace(model, name="golden", tokenizer=opening))


def test_who_knows_is_always_right():
    """Maths 18.9."""
    trials = sort_of(100) + contrastive_of(20)
    assert len(trials) == 120
    assert accuracy(OracleJudge(), trials) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_coin_is_at_chance(seed: int):
    """Maths 18.9: within its binomial interval."""
    trials = sort_of(250)
    rows = judge_trials(CoinJudge(seed), trials)
    low, high = wilson(sum(r["correct"] for r in rows), len(rows), level=0.999)
    assert low < 0.5 < high
    assert rows == judge_trials(CoinJudge(seed), trials)
    other = judge_trials(CoinJudge(seed + 10), trials)
    assert [r["correct"] for r in rows] != [r["correct"] for r in other]


def assert_order_does_not_matter(judge, trials):
    """Maths 18.10."""
    there = dict(judge.judge(trials))
    back = dict(judge.judge([swapped(t) for t in trials]))
    for i, trial in enumerate(trials):
        a, b = there[i], back[i]
        assert a.scores is not None
        assert a.scores == b.scores[::-1]
        assert {a.choice, b.choice} in ({1, 2}, {None})
        assert (a.choice == trial.answer) == (b.choice == swapped(trial).answer)


def test_words_do_not_mind_the_order():
    trials = sort_of(40) + contrastive_of(20)
    assert_order_does_not_matter(BaselineJudge(), trials)
    known = background_of(planted(25), WORDS)
    assert_order_does_not_matter(BaselineJudge(known), trials)


words = st.sampled_from([" a", " b", "C", "\n", ""])
texts = st.lists(words, max_size=4).map(tuple)
excerpts = texts.flatmap(
    lambda text: st.lists(
        st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=len(text), max_size=len(text)
    ).map(lambda acts: Shown(0, text, tuple(acts), 0))
)
shown_lists = st.lists(excerpts, max_size=2).map(tuple)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.data())
def test_ties_do_not_mind_the_order_either(data):
    one, two = data.draw(shown_lists), data.draw(shown_lists)
    q, r = data.draw(texts), data.draw(texts)
    trials = [
        Trial(
            kind="sort",
            features=((0, 0), (0, 1)),
            shown=(one, two),
            query=(q,),
            answer=1,
        ),
        Trial(
            kind="contrastive",
            features=((0, 0),),
            shown=(one,),
            query=(q, r),
            answer=2,
        ),
    ]
    assert_order_does_not_matter(BaselineJudge(), trials)
    answers = dict(BaselineJudge().judge(trials))
    assert (answers[0].choice is None) == (one == two)
    assert (answers[1].choice is None) == (q == r)


def test_words_find_planted_tokens():
    trials = sort_of(200)
    assert accuracy(BaselineJudge(background_of(planted(25), WORDS)), trials) > 0.9
    assert accuracy(BaselineJudge(), trials) > 0.85
    known = BaselineJudge(background_of(planted(20), WORDS))
    # Of a feature's two tokens the few excerpts may show one only.
    assert accuracy(known, contrastive_of(20)) > 0.8


def test_the_background_is_what_the_text_holds():
    examples = planted()
    known = background_of(examples, WORDS)
    counts = np.bincount(examples.token_WS[examples.token_WS >= 0], minlength=60)
    want = (counts + 1) / (counts.sum() + 61)
    got = [known(w.strip()) for w in WORDS]
    np.testing.assert_allclose(got, want)
    assert known("never seen") == pytest.approx(1 - sum(want))


def test_log_probabilities_are_the_models(local: LocalJudge):
    """Against the forward pass of one text without padding; also for many lengths."""
    model = local.model
    trials = sort_of(3) + contrastive_of(2)
    jobs = [job for t in trials for job in local._jobs(t)]
    found = local.log_probs(jobs)
    run = jax.jit(forward, static_argnames="cfg")
    for job in (jobs[0], jobs[-4], jobs[-1]):
        ids = jnp.asarray((*job.prefix, *job.text), jnp.int32)
        assert ids[0] == model.tokenizer.bos_id
        assert len(ids) <= model.cfg.n_ctx
        log_p_TV = jax.nn.log_softmax(run(model.params, ids, cfg=model.cfg), axis=-1)
        start = len(job.prefix)
        want = sum(float(log_p_TV[t - 1, ids[t]]) for t in range(start, len(ids)))
        assert found[job] == pytest.approx(want, abs=1e-3)


def test_what_does_not_fit_is_cut(local: LocalJudge):
    n_ctx = local.model.cfg.n_ctx
    job = local._fit(list(range(3, 90)), [5, 6, 7])
    assert job.text == (5, 6, 7)
    assert job.prefix == (1, *range(90 - (n_ctx - 4), 90))
    long = local._fit([8, 9], [5] * 200)
    assert long.prefix == (1, 9)
    assert long.text == (5,) * (n_ctx - 2)
    assert all(math.isfinite(x) for x in local.log_probs([job, long]).values())


def test_a_model_does_not_mind_the_order(local: LocalJudge):
    assert_order_does_not_matter(local, sort_of(30) + contrastive_of(15))
    assert local.name.startswith("local:golden:")


def test_a_model_prefers_what_it_finds_likely(local: LocalJudge):
    """The answer follows the model's own log-probabilities."""
    trials = sort_of(4)
    found = local.log_probs([job for t in trials for job in local._jobs(t)])
    for i, answer in local.judge(trials):
        one, two = (found[job] for job in local._jobs(trials[i]))
        assert answer.scores == pytest.approx((one, two), abs=1e-3)
        assert answer.choice == (1 if one > two else 2)
