"""Links by value and by response: in graph.json, and the page's switch between them."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from test_graph_json import make_graph, noise
from test_other_tools import foreign
from test_page import FEATURE, data_of, ids_of, open_file, violations

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.prune import prune
from jaxclt.graph.response import by_response
from jaxclt.graph.response_table import PARTS, Response, ResponseParts
from jaxclt.viewer.graph_json import graph_json, validate
from jaxclt.viewer.page import page

QK = ("2 2", "6 2 2 2")  # dashes of links through what heads attend to, + and −
JSON = {"qk_query": "query", "qk_key": "key", "norm": "norm", "gate": "gate"}


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Half of the edges act mostly through queries and keys, some through nothing else.

    Pruned by each reading; parts are listed of what one of them keeps.
    """
    graph = make_graph()
    there = graph.edge_RN != 0
    value_RN = np.where(noise(*there.shape, seed=19.0) < 0.2, 0, graph.edge_RN)
    size = {"query": 1.5, "key": 0.7, "norm": 0.3, "gate": 0.05}
    parts = {
        part: (noise(*there.shape, seed=23.0 + i) - 0.4) * size[part] * there
        for i, part in enumerate(PARTS)
    }
    parts["gate"][::2] = 0
    response_RN = (value_RN + sum(parts.values())).astype(np.float32)
    graph = dataclasses.replace(
        graph, edge_RN=value_RN.astype(np.float32), derivative_KN=value_RN[-2:]
    )
    graph = dataclasses.replace(graph, pruning=prune(graph, node_threshold=0.5))
    none = np.zeros(len(there), np.float32)
    response = Response(
        edge_RN=response_RN,
        rest_R=none,
        rest_abs_R=none,
        effect_QN=np.zeros((1 + len(PARTS), response_RN.shape[1]), np.float32),
        parts=ResponseParts(
            row_E=np.zeros(0, np.int32),
            col_E=np.zeros(0, np.int32),
            **{f"{part}_E": none[:0] for part in PARTS},
        ),
    )
    graph = dataclasses.replace(graph, response=response)
    kept = graph.pruning.keep_edge_RN | by_response(graph).pruning.keep_edge_RN
    row_E, col_E = (x.astype(np.int32) for x in np.nonzero(kept))
    listed = {f"{part}_E": x_RN[row_E, col_E] for part, x_RN in parts.items()}
    table = ResponseParts(row_E=row_E, col_E=col_E, **listed)
    return dataclasses.replace(
        graph, response=dataclasses.replace(response, parts=table)
    )


@pytest.fixture(scope="module")
def doc(graph) -> dict:
    return graph_json(graph, slug="both")


def test_links_of_either_reading_say_what_they_are_by_both(graph, doc):
    validate(doc)
    other = by_response(graph)
    keep = {"value": graph.pruning.keep_edge_RN, "response": other.pruning.keep_edge_RN}
    table, found = graph.response.parts, {}
    ids = {n["node_id"] for n in doc["nodes"]}
    for link in doc["links"]:
        assert {link["source"], link["target"]} <= ids
        found[np.float32(link["weight"]), np.float32(link["response"])] = link
    at = np.argwhere(keep["value"] | keep["response"])
    assert len(found) == len(doc["links"]) == len(at)
    marks = set()
    for e, (r, n) in enumerate(at):
        assert (table.row_E[e], table.col_E[e]) == (r, n)
        link = found[graph.edge_RN[r, n], other.edge_RN[r, n]]
        for name, part in JSON.items():
            want = getattr(table, f"{part}_E")[e]
            assert link.get(name, 0) == pytest.approx(want, rel=1e-3)
            assert (name in link) == (want != 0)
        marks.add(link.get("reading"))
        only = {"value": "response", "response": "value"}.get(link.get("reading"))
        assert [keep[reading][r, n] for reading in keep] == [
            reading != only for reading in keep
        ]
    assert marks == {"value", "response", None}
    influence_N = other.influence_N.astype(np.float64)
    share = np.sort(influence_N)[::-1].cumsum() / influence_N.sum()
    shown = [n["influence_response"] for n in doc["nodes"] if "influence_response" in n]
    assert len(shown) == len(doc["nodes"]) - graph.n_targets
    assert np.abs(np.array(shown)[:, None] - share).min(1).max() < 1e-6


def test_the_page_holds_both_and_writes_them_back(open_page, doc):
    data = data_of(page(doc))
    assert data["graph"] == doc
    tab = open_page(page(doc))
    assert tab.evaluate("__jaxclt.document().links") == doc["links"]
    open_file(tab, "both.json", doc)  # as a list of links
    tab.wait_for_function("() => __jaxclt.app.model.hasResponse")
    assert tab.evaluate("__jaxclt.document().links") == doc["links"]


def test_readers_of_other_tools_skip_what_is_ours(doc):
    with pytest.raises(InputError, match=r"links\[0\]\.reading"):
        validate({**doc, "links": [{**doc["links"][0], "reading": "x"}]})
    plain = foreign("attribute")
    plain["links"] = [{**link, "key": "a", "query": "b"} for link in plain["links"]]
    validate(plain, foreign=True)
    assert data_of(page(plain))["graph"]["links"] == plain["links"]


def dashes(tab) -> list[str | None]:
    root = ElementTree.fromstring(tab.evaluate("__jaxclt.svg()"))
    return [e.get("stroke-dasharray") for e in root.iter() if e.get("fill") == "none"]


def test_the_switch_changes_links_nodes_and_influence(open_page, doc):
    tab = open_page(page(doc))
    output = ids_of(doc, "logit")[0]
    tab.evaluate("id => __jaxclt.select(id)", output)
    seen = {}
    for reading, number in (("value", "weight"), ("response", "response")):
        tab.click(f"#by-{reading}")
        kept = [x for x in doc["links"] if x.get("reading", reading) == reading]
        mine = [x for x in kept if x["target"] == output]
        total = sum(abs(x[number]) for x in mine)
        key = {"value": "abs_input", "response": "share_total_response"}[reading]
        known = next(n[key] for n in doc["nodes"] if n["node_id"] == output)
        total = max(total, known)
        shares = tab.evaluate(
            "id => (m => [...m.insOf(m.byId.get(id))].map(e => m.share[e]))"
            "(__jaxclt.app.model)",
            output,
        )
        want = sorted((abs(x[number]) / total for x in mine), reverse=True)
        assert shares == pytest.approx(want, rel=1e-4)
        ends = {x[end] for x in kept for end in ("source", "target")}
        ends |= {*ids_of(doc, "embedding"), *ids_of(doc, "logit")}
        features = len(ends & set(ids_of(doc, FEATURE)))
        assert tab.text_content("#count") == f"{features} of {features} features"
        rank = [n for n in doc["nodes"] if n["node_id"] in ends]
        key = "influence" if reading == "value" else "influence_response"
        first = min(rank, key=lambda n: n[key] if n.get(key) is not None else 2)
        best = "__jaxclt.app.model.ranked.find(n => n.rank === 1).id"
        assert tab.evaluate(best) == first["node_id"]
        qk = [x for x in mine if reading == "response" and is_qk(x)]
        assert sum(dash in QK for dash in dashes(tab)) == len(qk)
        assert tab.locator("ul[aria-label=Inputs] .qk").count() == len(qk)
        assert tab.is_visible(".legend .attended") == bool(qk)
        seen[reading] = len(qk)
    assert seen["response"] > 0
    said = tab.locator("ul[aria-label=Inputs] li").first.text_content()
    assert "value " in said
    assert "query " in said
    assert violations(tab) == []
    tab.wait_for_function("() => location.hash.includes('reading=response')")
    tab = open_page(page(doc), hash=tab.evaluate("location.hash"))
    assert tab.get_attribute("#by-response", "aria-pressed") == "true"
    node = next(n for n in doc["nodes"] if n.get("hidden"))
    tab.evaluate("id => __jaxclt.select(id)", node["node_id"])
    facts = tab.text_content("#sidebody .facts").replace("−", "-")
    for name in ("derivative", "hidden"):
        said = re.search(rf"{name.title()}([-+][\d.]+)", facts)
        assert float(said[1]) == pytest.approx(node[name], rel=5e-3)


def is_qk(link: dict) -> bool:
    """Whether queries and keys are at least half of a link's parts, without sign."""
    attended = abs(link.get("qk_query", 0) + link.get("qk_key", 0))
    others = [link["weight"], link.get("norm", 0), link.get("gate", 0)]
    return attended >= sum(map(abs, others))


def test_a_graph_of_one_reading_has_no_switch(open_page, graph):
    for one, reading in ((make_graph(), "value"), (by_response(graph), "response")):
        doc = graph_json(one, slug="one")
        tab = open_page(page(doc))
        assert not tab.is_visible("#readings")
        assert tab.evaluate("__jaxclt.app.model.reading") == reading
        weights = [link["weight"] for link in doc["links"]]
        assert tab.evaluate("[...__jaxclt.app.model.weight]") == pytest.approx(weights)
