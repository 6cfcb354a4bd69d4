"""Held-out text, the paper's filters, baselines at equal L0."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_model, write_text

from jaxclt.clt.active import active_features
from jaxclt.clt.neurons import NeuronDictionary
from jaxclt.errors import InputError
from jaxclt.evaluation.baselines import neuron_thresholds
from jaxclt.evaluation.prompts import (
    graph_filter,
    pick_prompts,
    read_eval_text,
    unsure,
)
from jaxclt.lm.run import record
from jaxclt.text.windows import TokenWindows


def test_each_rule_of_the_filter_leaves_out():
    token_WS = np.array([[5, 6, 7, 8, 9, 9]])
    next_WS = np.array([[6, 7, 8, 9, 6, -1]])
    right = next_WS.copy()
    sure = np.full((1, 6), 0.5)
    count_V = np.full(10, 1)
    count_V[0] = 1_000_000
    good = graph_filter(token_WS, right, sure, next_WS, count_V)
    # the last but one is in the context already, the last has no truth
    assert good.tolist() == [[True, True, True, True, False, False]]
    for change in (
        {"model_WS": right + 1},
        {"confidence_WS": np.full((1, 6), 0.81)},
        {"count_V": np.full(10, 1)},
    ):
        given = {
            "model_WS": right,
            "confidence_WS": sure,
            "next_WS": next_WS,
            "count_V": count_V,
        }
        assert not graph_filter(token_WS, **(given | change)).any()
    # -1 is no token, hence never right
    assert unsure(abs(right), sure, next_WS).tolist() == [[True] * 5 + [False]]
    assert not unsure(right, np.full((1, 6), 0.8), next_WS)[0, :5].any()


def test_prompts_are_picked_one_from_a_window():
    token_WS = np.arange(60).reshape(6, 10)
    good_WS = np.ones((6, 10), bool)
    good_WS[2] = False
    key = jax.random.key(1)
    found = pick_prompts(token_WS, good_WS, 10, key, lengths=(3, 6))
    assert len(found) == 5
    assert all(3 <= len(x) <= 6 for x in found)
    assert len({x[0] for x in found}) == 5
    assert all(x[0] % 10 == 0 and x[0] != 20 for x in found)
    assert found == pick_prompts(token_WS, good_WS, 10, key, lengths=(3, 6))
    assert len(pick_prompts(token_WS, good_WS, 2, key, lengths=(3, 6))) == 2


def test_text_asks_for_every_next_token(tmp_path: Path):
    model = tiny_model()
    write_text(tmp_path, 8)
    text = read_eval_text(model, tmp_path, tokens=100, context=17)
    assert text.windows.n_tokens >= 100
    token_WS = text.windows.token_WS
    where = np.argwhere(text.ask_WS)
    assert len(where) > 50
    for w, s in where:
        assert s > 0
        assert text.next_WS[w, s] == token_WS[w, s + 1] >= 0
    assert text.count_V.sum() > text.windows.n_tokens  # of more text


def test_prompts_ask_at_their_end(tmp_path: Path):
    model = tiny_model()
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "w3 w4 w5", "answer": " w6"},
        {"prompt": "w9 w3"},
        {"prompt": "w7 w3 w4 w8", "answer": " w9 w3"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    text = read_eval_text(model, file, tokens=1000, context=16)
    assert text.prompts
    assert text.ask_WS.sum(1).tolist() == [1, 1, 1]
    last = (text.windows.token_WS >= 0).sum(1) - 1
    assert text.ask_WS.argmax(1).tolist() == last.tolist()
    next_W = text.next_WS[np.arange(3), last]
    ids = [model.tokenizer.encode(r["prompt"] + r.get("answer", "")) for r in rows]
    assert next_W.tolist() == [ids[0][-1], -1, ids[2][-2]]
    file.write_text('{"prompt": "w3"}\nnot json\n')
    with pytest.raises(InputError, match="line 2"):
        read_eval_text(model, file, tokens=10, context=16)
    file.write_text('{"prompt": 3}\n')
    with pytest.raises(InputError, match="only text is read"):
        read_eval_text(model, file, tokens=10, context=16)


def test_thresholds_keep_as_many_neurons_as_wanted():
    model = tiny_model()
    token_WS = np.asarray(jax.random.randint(jax.random.key(0), (3, 20), 3, 90))
    mask_WS = np.ones((3, 20), bool)
    mask_WS[:, 0] = False
    wanted = [3.0, 40.0, 200.0]
    found = neuron_thresholds(model, TokenWindows(token_WS, mask_WS), wanted)
    assert found == sorted(found, reverse=True)
    for threshold, l0 in zip(found, wanted, strict=True):
        counts = []
        for token_S in token_WS:
            recording = record(model.params, jnp.asarray(token_S), cfg=model.cfg)
            active = active_features(
                NeuronDictionary(threshold=threshold),
                model.params,
                recording,
                model.cfg,
            )
            counts.append((active.pos_A > 0).sum())
        # three digits of the threshold are kept
        assert np.sum(counts) / mask_WS.sum() == pytest.approx(l0, rel=0.02)
