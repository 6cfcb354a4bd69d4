"""attention.json, what reports and commands say of it, and the calls of a notebook."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from test_cli import DICTIONARY, MODEL, run, trace

import jaxclt
from jaxclt.attending.document import check_attention, qk_tracing_results
from jaxclt.attending.words import side_name
from jaxclt.errors import InputError

# As the graph servers that know these fields document them.
PAIR = {"type": "array", "prefixItems": [{"type": "string"}] * 2 + [{"type": "number"}]}
ONE = {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]}
NEURONPEDIA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["pair_wise_contributors"],
    "properties": {
        "pair_wise_contributors": {"type": "array", "items": PAIR | {"minItems": 3}},
        **{
            f"top_{side}_marginal_contributors": {
                "type": "array",
                "items": ONE | {"minItems": 2, "maxItems": 2},
            }
            for side in "qk"
        },
    },
}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attention") / "graph"
    assert trace(out, "--attention", 6) == 0
    return out


@pytest.fixture(scope="module")
def doc(traced: Path) -> dict:
    return json.loads((traced / "attention.json").read_text())


@pytest.fixture(scope="module")
def opened(traced: Path) -> tuple[jaxclt.Model, object, jaxclt.Graph]:
    model = jaxclt.load_model(MODEL)
    dictionary = jaxclt.load_dictionary(DICTIONARY, model)
    return model, dictionary, jaxclt.load_graph(traced / "graph.npz")


def test_the_file_says_what_its_schema_asks(traced: Path, doc: dict) -> None:
    check_attention(doc, "attention.json")
    graph = json.loads((traced / "graph.json").read_text())
    assert doc["tokens"] == graph["metadata"]["prompt_tokens"]
    assert doc["contrast"].startswith("logit(")
    assert len(doc["cells"]) == 6
    T = len(doc["tokens"])
    for cell in doc["cells"]:
        assert 0 < cell["query"] < T
        assert len(cell["pattern"]) == cell["query"] + 1
        assert sum(cell["pattern"]) == pytest.approx(1, abs=1e-3)
        assert cell["pattern"][cell["key"]] == pytest.approx(cell["weight"], rel=1e-3)
        assert 0 < len(cell["pairs"]) <= 30
        assert 0 < len(cell["query_nodes"]) <= 20
        whole = doc["patterns"][f"{cell['layer']}.{cell['head']}"]
        assert [len(row) for row in whole] == list(range(1, T + 1))
        assert whole[cell["query"]] == pytest.approx(cell["pattern"], rel=1e-3)
    effects = [abs(cell["effect"]) for cell in doc["cells"]]
    assert effects == sorted(effects, reverse=True)
    heads = [abs(head["effect"]) for head in doc["heads"]]
    assert heads == sorted(heads, reverse=True)
    broken = {**doc, "cells": [{**doc["cells"][0], "weight": "much"}]}
    with pytest.raises(InputError, match=r"a\.json: \$\.cells\[0\]\.weight: 'much'"):
        check_attention(broken, "a.json")


def test_nodes_are_those_of_the_graph(doc: dict, opened: tuple) -> None:
    """Every id but two is found again, under the name that stands next to it."""
    graph = opened[2]
    for cell in doc["cells"]:
        named = [*cell["query_nodes"], *cell["key_nodes"]]
        named += [pair[i::2] for pair in cell["pairs"] for i in (0, 1)]
        for i, name, *_ in named:
            if i in ("bias", "rest"):
                assert name == i
            else:
                assert side_name(graph, jaxclt.find_node(graph, i)) == name


def test_the_report_and_the_summary(traced: Path, doc: dict, capsys) -> None:
    report = json.loads((traced / "report.json").read_text())
    said = report["attention"]
    assert said["max_relative_error"] < 1e-5
    assert [cell["text"] for cell in said["cells"]] == [c["text"] for c in doc["cells"]]
    assert said["cells"][0]["pairs"] == doc["cells"][0]["pairs"][:3]
    assert report["timing_s"]["attention"] >= 0
    first = doc["cells"][0]
    tokens = doc["tokens"]
    place = f'L{first["layer"]}H{first["head"]} at "{tokens[first["query"]]}"'
    assert first["text"].startswith(place)
    assert " because [" in first["text"]
    assert "] x [" in first["text"]


def test_none_if_none_are_asked_for(traced: Path, tmp_path: Path) -> None:
    """And a file that another trace left is taken away."""
    out = tmp_path / "graph"
    out.mkdir()
    (out / "attention.json").write_text("{}")
    assert trace(out, "--attention", 0) == 0
    assert not (out / "attention.json").exists()
    assert "attention" not in json.loads((out / "report.json").read_text())


def test_a_cell_by_the_calls_of_a_notebook(doc: dict, opened: tuple) -> None:
    """Recorded again, for all nodes: the same numbers."""
    model, dictionary, graph = opened
    first = doc["cells"][0]
    at = {name: first[name] for name in ("layer", "head", "query", "key")}
    found = jaxclt.attention(model, dictionary, graph, **at)
    for name in ("weight", "score", "effect", "pattern_effect"):
        assert found.said[name] == pytest.approx(first[name], rel=1e-4, abs=1e-5)
    assert found.apart.relative_error < 1e-5
    assert found.apart.query_UC.shape[0] == graph.edge_RN.shape[1] + 2
    text = str(found)
    assert text.splitlines()[0] == found.said["text"]
    assert first["query_nodes"][0][1] in text
    effects = jaxclt.head_effects(model, dictionary, graph, n=50)
    best = effects.strongest_heads(1)[0]
    assert best[:2] == (doc["heads"][0]["layer"], doc["heads"][0]["head"])
    assert best[2] == pytest.approx(doc["heads"][0]["effect"], rel=1e-4)
    same = [c for c in effects.cells if c[:4] == tuple(at.values())]
    assert same[0].effect == pytest.approx(first["effect"], rel=1e-4)


def test_a_direction_has_scores_but_no_effects(opened: tuple) -> None:
    """The file of a graph does not hold what a direction reads."""
    model, dictionary, graph = opened
    token_K = np.full_like(graph.target_token_K, -1)
    other = dataclasses.replace(graph, target_token_K=token_K)
    at = {"layer": 1, "head": 0, "query": 3, "key": 1}
    found = jaxclt.attention(model, dictionary, other, **at)
    assert np.isnan(found.said["effect"])
    assert "effect" not in str(found)
    with pytest.raises(InputError, match="direction that the file does not hold"):
        jaxclt.head_effects(model, dictionary, other)


def test_explain_a_head(traced: Path, doc: dict, capsys) -> None:
    first = doc["cells"][0]
    place = [first["key"], first["query"]]
    head = f"{first['layer']}:{first['head']}"
    assert run("explain", traced, *place, "--head", head, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["score"] == pytest.approx(first["score"], rel=1e-4)
    assert run("explain", traced, *place, "--head", head) == 0
    assert capsys.readouterr().out.startswith(f"L{head.replace(':', 'H')} at ")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ({"layer": 99}, "layer=99: the model has layers 0 to"),
        ({"head": -1}, "head=-1: the model has heads 0 to"),
        ({"query": 1, "key": 2}, "key=2 comes after query=1"),
        ({"query": 77}, "query=77: the prompt has positions 0 to"),
        ({"key": "nowhere"}, 'key="nowhere": there is no such token'),
    ],
)
def test_wrong_places_are_named(opened: tuple, at: dict, message: str) -> None:
    usual = {"layer": 0, "head": 0, "query": 2, "key": 1}
    with pytest.raises(InputError, match=message):
        jaxclt.attention(*opened, **(usual | at))


def test_tokens_by_their_text(opened: tuple) -> None:
    graph = opened[2]
    tokens = graph.meta.tokens
    twice = next(token for token in tokens if tokens.count(token) == 2)
    with pytest.raises(InputError, match=r"this token stands at \[\d+, \d+\]"):
        jaxclt.attention(*opened, layer=0, head=0, query=twice, key=0)
    once = next(token for token in tokens if tokens.count(token) == 1)
    at = {"layer": 0, "head": 0, "key": 0}
    found = jaxclt.attention(*opened, query=once.strip(), **at)
    assert found.apart.cell.query == tokens.index(once)


def test_heads_have_a_form(traced: Path, capsys) -> None:
    assert run("explain", traced, 0, 1, "--head", "nine") == 2
    assert "write LAYER:HEAD, for example 9:3" in capsys.readouterr().err


def test_neuronpedia_has_these_fields(doc: dict) -> None:
    """The shape that llamascopium writes and Neuronpedia's viewer reads."""
    check = jsonschema_rs.validator_for(NEURONPEDIA)
    for cell in doc["cells"]:
        found = qk_tracing_results(cell)
        check.validate(found)
        assert len(found["pair_wise_contributors"]) == len(cell["pairs"])
        score = found["pair_wise_contributors"][0][2]
        assert score == cell["pairs"][0][4]
        assert found["top_k_marginal_contributors"][0][0] == cell["key_nodes"][0][0]
