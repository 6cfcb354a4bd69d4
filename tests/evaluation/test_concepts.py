"""Pairs of sentences: the file, and what features do on them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclt.clt.active import active_features
from jaxclt.clt.coder import load
from jaxclt.errors import InputError
from jaxclt.evaluation import concepts
from jaxclt.evaluation.concepts import ConceptPair, load_pairs, sentence_peaks
from jaxclt.io.dictionary import load_dictionary
from jaxclt.io.model import Model, load_model
from jaxclt.lm.run import record

_record = jax.jit(record, static_argnames="cfg")
GOLDENS = Path(__file__).parents[1] / "goldens"


def test_the_pairs_that_come_with_the_package():
    pairs = load_pairs()
    assert len(pairs) >= 60
    assert len({p.concept for p in pairs}) == len(pairs)
    assert len({s for p in pairs for s in p.sentences}) == 2 * len(pairs)
    for pair in pairs:
        short, long = sorted(map(len, pair.sentences))
        assert long <= 1.4 * short, pair


def test_a_file_of_ones_own(tmp_path: Path):
    entries = [
        {"concept": "a", "with": "x y", "without": " z "},
        {"concept": "b", "with": "é", "without": "e"},
    ]
    want = (ConceptPair("a", ("x y", "z")), ConceptPair("b", ("é", "e")))
    as_list, as_lines = tmp_path / "p.json", tmp_path / "p.jsonl"
    as_list.write_text(json.dumps(entries), "utf-8")
    as_lines.write_text("\n\n".join(map(json.dumps, entries)) + "\n", "utf-8")
    assert load_pairs(as_list) == load_pairs(str(as_lines)) == want


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "{", "p.json is not JSON"),
        ("p.json", "{}", "must hold a JSON list"),
        ("p.json", "[]", "holds no pair"),
        ("p.jsonl", "\n", "holds no pair"),
        ("p.jsonl", '{"concept": "a", "with": "b", "without": "c"}\n[', "p.jsonl:2 is"),
        ("p.json", '["a"]', "pair 1: each must be an object"),
        ("p.json", '[{"concept": "a", "with": "b"}]', "pair 1: each must be"),
        ("p.json", '[{"concept": "a", "with": "b", "without": " "}]', "must be"),
        ("p.json", '[{"concept": "a", "with": "b", "without": 3}]', "must be"),
        ("p.json", '[{"concept": "a", "with": "b", "without": "b"}]', "the same"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_pairs(tmp_path / name)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot read .*none.json"):
        load_pairs(tmp_path / "none.json")
    (tmp_path / "p.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_pairs(tmp_path / "p.json")


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(GOLDENS / "circuit_tracer_clt" / "model")


PAIRS = [
    ConceptPair("a", ("w3 w4 w5 w6", "w7 w8")),
    ConceptPair("b", ("w9", "w10 w11 w12 w13 w14")),
    ConceptPair("c", ("w20 w21 w22", "w23 w24 w25")),
]


@pytest.mark.parametrize("kind", ["clt", "neurons"])
@pytest.mark.parametrize("together", [1, 1 << 25])
def test_peaks_are_those_of_a_trace(model: Model, kind, together, monkeypatch):
    """Against the activations that graphs are made of, one sentence at a time."""
    monkeypatch.setattr(concepts, "_NUMBERS", together)
    spec = str(GOLDENS / "circuit_tracer_clt" / "dictionary")
    dictionary = load_dictionary("neurons" if kind == "neurons" else spec, model)
    encoder = load(dictionary, model.params, model.cfg)
    L, F = model.cfg.n_layers, encoder.n_features
    layer_U, feature_U = np.divmod(np.arange(L * F)[::-3], F)
    got_P2U = sentence_peaks(encoder, model, PAIRS, layer_U, feature_U)
    assert got_P2U.shape == (3, 2, len(layer_U))
    special = model.tokenizer.special_ids
    for p, pair in enumerate(PAIRS):
        for side, text in enumerate(pair.sentences):
            ids = model.tokenizer.encode(text)
            keep_T = [i > 0 and token not in special for i, token in enumerate(ids)]
            a_LTF = dense(model, dictionary, ids)[:, keep_T]
            a_TU = np.pad(a_LTF, ((0, 0), (1, 0), (0, 0)))
            a_TU = a_TU[layer_U, :, feature_U].T
            at_U = np.abs(a_TU).argmax(0)
            want_U = a_TU[at_U, np.arange(len(at_U))]
            np.testing.assert_allclose(got_P2U[p, side], want_U, atol=1e-5)
    if kind == "clt":
        assert 0 < (got_P2U != 0).mean() < 1


def dense(model: Model, dictionary, ids: list[int]) -> np.ndarray:
    token_T = jnp.asarray(ids, jnp.int32)
    rec = _record(model.params, token_T, cfg=model.cfg)
    active = active_features(dictionary, model.params, rec, model.cfg)
    a_LTF = np.zeros((model.cfg.n_layers, len(ids), 512), np.float32)
    keep = np.asarray(active.value_A) != 0
    at = (np.asarray(x)[keep] for x in (active.layer_A, active.pos_A, active.feature_A))
    a_LTF[tuple(at)] = np.asarray(active.value_A)[keep]
    return a_LTF
