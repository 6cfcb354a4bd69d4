"""Nodes and edges as tables, as networkx has them, and as GraphML."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import networkx
import numpy as np
import pytest
from cases import case_graph

from jaxclt.errors import InputError
from jaxclt.graph.tables import save_graphml, to_networkx
from jaxclt.viewer.graph_json import graph_json


def test_tables_are_what_graph_json_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = case_graph("clt")
    doc = graph_json(graph, slug="g")
    nodes = graph.nodes.set_index("id")
    assert set(nodes.index) >= {node["node_id"] for node in doc["nodes"]}
    for node in doc["nodes"]:
        row = nodes.loc[node["node_id"]]
        assert row["pos"] == node["ctx_idx"]
        if node["activation"] is not None:
            assert row["activation"] == pytest.approx(node["activation"], rel=1e-6)
    links = {(x["source"], x["target"]): x["weight"] for x in doc["links"]}
    edges = graph.edges
    assert len(edges) == len(links)
    for source, target, weight in edges.itertuples(index=False):
        assert weight == pytest.approx(links[source, target], rel=1e-5)
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "pandas" else known(name),
    )
    without = dataclasses.replace(graph)
    assert [node["id"] for node in without.nodes] == list(nodes.index)
    assert len(repr(graph)) < 300


def test_networkx_has_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = case_graph("clt")
    made = graph.to_networkx()
    kept_RN = np.where(graph.pruning.keep_edge_RN, graph.edge_RN, 0)
    ids = {node: data["id"] for node, data in made.nodes(data=True)}
    assert set(ids) == set(ids.values())
    total = sum(weight for *_, weight in made.edges(data="weight"))
    assert total == pytest.approx(kept_RN.sum(), rel=1e-5)
    assert networkx.is_directed_acyclic_graph(made)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install networkx"):
        to_networkx(graph)


def test_graphml_holds_hostile_text(tmp_path: Path) -> None:
    graph = case_graph("clt")
    words = "<b>&\x00\x1b]\ud800"
    tokens = (words, *graph.meta.tokens[1:])
    named = dataclasses.replace(
        graph, meta=dataclasses.replace(graph.meta, tokens=tokens)
    )
    save_graphml(tmp_path / "g.graphml", named)
    read = networkx.read_graphml(tmp_path / "g.graphml")
    assert read.number_of_edges() == named.to_networkx().number_of_edges()
    labels = {data.get("label") for _, data in read.nodes(data=True)}
    assert "<b>&\ufffd\ufffd]\ufffd" in labels
