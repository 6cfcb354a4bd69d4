"""Trials are what they say they are, whatever the examples."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_cases import (
    WORDS,
    make_examples,
    make_windows,
    planted,
    source,
    swapped,
    trial_of,
)

from jaxclt.evaluation.concepts import ConceptPair
from jaxclt.evaluation.trials import Trial, contrastive_trials, sort_trials

KEY = jax.random.key(0)


def row_of(examples, feature) -> int:
    same = (examples.layer_U == feature[0]) & (examples.feature_U == feature[1])
    return int(np.flatnonzero(same)[0])


def activations(examples, fires_on, trial: Trial, text) -> list[bool]:
    """Whether each of the trial's features fires on any token of a text."""
    return [
        any(WORDS.index(t) in fires_on[row_of(examples, f)] for t in text)
        for f in trial.features
    ]


features = st.lists(st.sets(st.integers(0, 59), max_size=5), min_size=2, max_size=8)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(fires_on=features, seed=st.integers(0, 9), n_shown=st.integers(1, 4))
def test_a_query_is_held_out_and_silences_the_other(fires_on, seed, n_shown):
    examples = make_examples(fires_on, make_windows(seed, W=60))
    trials = sort_trials(source(examples, n_shown, context=6), 10, jax.random.key(seed))
    pairs = [tuple(sorted(t.features)) for t in trials]
    assert len(set(pairs)) == len(pairs)
    for trial in trials:
        assert trial.features[0] != trial.features[1]
        right = trial.answer - 1
        rows = [row_of(examples, f) for f in trial.features]
        on = [examples.fired(u, trial.window) for u in rows]
        assert on[right]
        assert not on[1 - right]
        (query,) = trial.query
        assert activations(examples, fires_on, trial, query)[right]
        for u, each in zip(rows, trial.shown, strict=True):
            assert [s.window for s in each] == list(examples.top.window_UE[u, :n_shown])
        shown = trial.shown[right]
        assert trial.window not in [s.window for s in shown]
        assert query not in [s.tokens for s in shown]


def test_excerpts_are_cut_about_their_peaks():
    examples = planted()
    for u in range(12):
        for e in np.flatnonzero(examples.top.window_UE[u] >= 0):
            for context in (1, 2, 5, 100):
                shown = source(examples, context=context).excerpt(
                    examples.top, u, int(e)
                )
                row_S = examples.token_WS[shown.window]
                assert 1 <= len(shown.tokens) == len(shown.acts) <= context
                peak_token = int(row_S[examples.top.pos_UE[u, e]])
                assert shown.tokens[shown.peak] == WORDS[peak_token]
                value = examples.top.value_UE[u, e]
                assert shown.acts[shown.peak] == pytest.approx(value, rel=1e-3)
                fires = [WORDS.index(t) // 2 == u for t in shown.tokens]
                assert [a > 0 for a in shown.acts] == fires


def test_padding_is_not_shown():
    token_WS = make_windows(W=30)
    token_WS[:, 5:] = -1
    examples = make_examples([{i} for i in range(0, 60, 7)], token_WS)
    for trial in sort_trials(source(examples, 1), 9, KEY):
        assert max(len(s.tokens) for each in trial.shown for s in each) <= 5
        assert len(trial.query[0]) <= 5


def test_the_key_decides_and_more_trials_only_add():
    """Maths 18.12."""
    examples = planted()
    first = sort_trials(source(examples), 20, KEY)
    assert len(first) == 20
    assert first == sort_trials(source(examples), 20, KEY)
    assert first[:7] == sort_trials(source(examples), 7, KEY)
    other = sort_trials(source(examples), 20, jax.random.key(1))
    assert first != other


def test_answers_are_balanced():
    trials = sort_trials(source(planted(25)), 200, KEY)
    assert len(trials) == 200
    ones = sum(t.answer == 1 for t in trials)
    lower_first = sum(t.features[0] < t.features[1] for t in trials)
    assert 70 < ones < 130
    assert 70 < lower_first < 130


def test_identical_features_give_no_query():
    """Maths 18.11: also where they are the most similar pair."""
    examples = make_examples([{1, 2}, {1, 2}, {1, 2}], make_windows())
    assert sort_trials(source(examples), 5, KEY) == []
    same_UD = np.ones((3, 2))
    assert sort_trials(source(examples), 5, KEY, direction_UD=same_UD) == []


def test_too_few_examples_give_no_trial():
    examples = make_examples([{1}, set(), {2}], make_windows(W=20))
    assert sort_trials(source(examples, 6), 5, KEY) == []
    assert sort_trials(source(examples, 1), 0, KEY) == []
    assert all(
        (0, 10) not in t.features for t in sort_trials(source(examples, 1), 5, KEY)
    )


def test_similar_pairs_come_by_their_cosine():
    examples = planted(8)
    direction_UD = np.asarray(jax.random.normal(KEY, (8, 3)))
    trials = sort_trials(source(examples), 10, KEY, direction_UD=direction_UD)
    unit_UD = direction_UD / np.linalg.norm(direction_UD, axis=1, keepdims=True)
    cosine_UU = unit_UD @ unit_UD.T
    want = np.sort(cosine_UU[np.triu_indices(8, 1)])[::-1][:10]
    assert np.allclose([t.cosine for t in trials], want, rtol=1e-3)
    for t in trials:
        u, v = (row_of(examples, f) for f in t.features)
        assert t.similar
        assert t.cosine == pytest.approx(cosine_UU[u, v], rel=1e-3)


def pairs_of(n: int) -> list[ConceptPair]:
    return [
        ConceptPair(f"c{i}", (f"{i} {i + 1}", f"{i + 2} {i + 3}")) for i in range(n)
    ]


def encode(text: str) -> list[int]:
    return [int(x) for x in text.split()]


@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 99))
def test_contrastive_features_are_active_on_one_sentence(data, seed):
    examples = planted(5)
    sizes = st.sampled_from([0.0, 0.0, 0.5, 2.0, -1.0])
    flat = data.draw(st.lists(sizes, min_size=30, max_size=30))
    peak_P2U = np.array(flat, np.float32).reshape(3, 2, 5)
    pairs = pairs_of(3)
    trials = contrastive_trials(
        source(examples), pairs, peak_P2U, 100, jax.random.key(seed), encode=encode
    )
    assert len(trials) == ((peak_P2U != 0).sum(1) == 1).sum()
    for trial in trials:
        p = int(trial.concept[1:])
        u = row_of(examples, trial.features[0])
        texts = [tuple(WORDS[i] for i in encode(s)) for s in pairs[p].sentences]
        on = trial.query[trial.answer - 1]
        side = texts.index(on)
        assert trial.query[2 - trial.answer] == texts[1 - side]
        assert trial.weight == abs(peak_P2U[p, side, u]) > 0
        assert peak_P2U[p, 1 - side, u] == 0
        assert trial.shown[0][0].window == examples.top.window_UE[u, 0]


def test_contrastive_is_seeded_and_balanced():
    """Maths 18.12."""
    examples = planted(10)
    peak_P2U = np.zeros((20, 2, 10), np.float32)
    peak_P2U[:, 0] = 1

    def make(n, seed):
        return contrastive_trials(
            source(examples), pairs_of(20), peak_P2U, n, jax.random.key(seed),
            encode=encode,
        )  # fmt: skip

    first = make(200, 0)
    assert first == make(200, 0)
    assert first != make(200, 1)
    assert make(50, 0) == first[:50]
    assert 70 < sum(t.answer == 1 for t in first) < 130
    assert make(0, 0) == []


def test_a_trial_is_json_and_back_and_swaps():
    examples = planted()
    trials = sort_trials(source(examples), 3, KEY)
    peak_P2U = np.zeros((1, 2, 12), np.float32)
    peak_P2U[0, 1] = 0.123456
    trials += contrastive_trials(
        source(examples), pairs_of(1), peak_P2U, 3, KEY, encode=encode
    )
    for trial in trials:
        text = json.dumps(trial.as_json())
        again = trial_of(json.loads(text))
        assert again == trial
        assert again.key == trial.key
        other = swapped(trial)
        assert other.answer == 3 - trial.answer
        assert other.key != trial.key
        assert swapped(other) == trial
    assert len({t.key for t in trials}) == 6
