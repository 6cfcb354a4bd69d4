"""What two graphs of the bundled model differ in, beside brute force in Python."""

from __future__ import annotations

import copy

import pytest
from test_first_picture import SIZES
from test_graph_json import make_graph
from test_page import ids_of, violations

import jaxclt
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import node_id
from jaxclt.graph.paths import strongest_paths
from jaxclt.viewer.graph_json import graph_json
from jaxclt.viewer.page import page

DIFFERENCES = """which => {
  const {app} = __jaxclt, {nodes, links} = __jaxclt.compared();
  const id = (m, d, end) => m[end](d).id;
  if (which === 'nodes') return nodes.map(
    ({here, there, left, right, by}) => [(here ?? there).id, left, right, by]);
  return links.map(({here, there, left, right, by}) => {
    const m = here === null ? app.other : app.model, e = here ?? there;
    return [id(m, e, 'from') + ' > ' + id(m, e, 'to'), left, right, by];
  });
}"""


@pytest.fixture(scope="module")
def both() -> list[tuple[Graph, dict]]:
    model = jaxclt.load_model("addition")
    dictionary = jaxclt.load_dictionary("addition-clt", model=model)
    graphs = [
        jaxclt.attribute(model, dictionary, prompt, max_features=100)
        for prompt in ("calc: 36+59=", "calc: 36+58=")
    ]
    return [(g, graph_json(g, slug="x")) for g in graphs]


def named(node: dict) -> str:
    """What stands for a node in the other graph: outputs by their token."""
    return node["clerp"].split('"')[1] if is_output(node) else node["node_id"]


def is_output(node: dict) -> bool:
    return node["feature_type"] == "logit"


def sizes(graph: Graph, doc: dict) -> dict[str, float]:
    """Each shown node's part of the influence; of an output its probability."""
    total = graph.influence_N.sum()
    part = {node_id(graph, i): x / total for i, x in enumerate(graph.influence_N)}
    return {
        named(n): n["token_prob"] if is_output(n) else part[n["node_id"]]
        for n in doc["nodes"]
    }


def weights(doc: dict) -> dict[str, float]:
    name = {n["node_id"]: named(n) for n in doc["nodes"]}
    return {
        f"{name[x['source']]} > {name[x['target']]}": x["weight"] for x in doc["links"]
    }


def by_force(left: dict[str, float], right: dict[str, float]) -> dict[str, tuple]:
    return {
        key: (left.get(key), right.get(key), right.get(key, 0) - left.get(key, 0))
        for key in {*left, *right}
    }


def plain(key: str, outputs: dict[str, str]) -> str:
    return " > ".join(outputs.get(part, part) for part in key.split(" > "))


def test_differences_are_those_of_brute_force(open_page, both):
    (one, a), (two, b) = both
    other = copy.deepcopy(b)
    shared = ids_of(a, "embedding")[0]
    for doc in (a, b):  # the prompts differ in one token, of another id
        assert shared in ids_of(doc, "embedding")
    tab = open_page(page(a, other=other), size=SIZES["desk"])
    tab.click("#view-compare")
    outputs = {n["node_id"]: named(n) for d in (a, b) for n in d["nodes"]}
    want = {
        "nodes": by_force(sizes(one, a), sizes(two, b)),
        "links": by_force(weights(a), weights(b)),
    }
    for which, expected in want.items():
        got = tab.evaluate(DIFFERENCES, which)
        found = {plain(key, outputs): tuple(row) for key, *row in got}
        differing = {k: v for k, v in expected.items() if v[2] or None in v}
        assert len(got) == len(found)
        assert differing.keys() <= found.keys() <= expected.keys()
        for key, (left, right, by) in found.items():
            wanted = expected[key]
            assert [left is None, right is None] == [x is None for x in wanted[:2]]
            assert by == pytest.approx(wanted[2], abs=1e-5), key
        order = [abs(row[3]) for row in got]
        assert order == sorted(order, reverse=True)
        assert sum(None in row for row in expected.values()) > 10  # in one only
    # The rows say the same, in this order, and go to their nodes.
    first = tab.evaluate(DIFFERENCES, "nodes")[0][0]
    tab.locator("#comparerows button").first.click()
    chosen = tab.evaluate("(__jaxclt.app.selected ?? __jaxclt.compared().right)?.id")
    assert chosen == first
    tab.click("#comparetabs >> text=Only right")
    tab.locator("#comparerows button").first.click()
    assert tab.evaluate("__jaxclt.app.selected") is None
    assert tab.evaluate("__jaxclt.compared().right !== null")
    assert "only right" in tab.locator("#comparerows tr").first.text_content()
    tab.click("#comparetabs >> text=Links that differ")
    row = tab.locator("#comparerows tr").first
    assert row.locator("button").count() == 2
    cells = row.locator("td").all_text_contents()
    _, left, right, by = tab.evaluate(DIFFERENCES, "links")[0]
    said = [0.0 if not c else float(c.replace("−", "-")) for c in cells[2:5]]
    assert said == pytest.approx([left or 0, right or 0, by], rel=5e-3)
    row.locator("button").last.click()
    assert tab.evaluate("__jaxclt.app.view") == "compare"
    assert violations(tab) == []


SHARE = """ids => {
  const {model: m} = __jaxclt.app;
  const at = (e, a, b) => m.from(e).id === a && m.to(e).id === b;
  return ids.slice(1).reduce((product, b, i) => product * m.share[
    [...m.insOf(m.byId.get(b))].find((e) => at(e, ids[i], b))], 1);
}"""


def test_paths_have_the_shares_that_the_command_prints(open_page, both):
    graph, doc = both[0]
    tab = open_page(page(doc))
    end = graph.layout.row_of(graph.layout.at("target", 0))
    paths = strongest_paths(graph, end=end, k=15, kept=True)
    for path in paths:
        share = tab.evaluate(SHARE, [node_id(graph, node) for node in path.nodes])
        assert share == pytest.approx(path.strength, rel=1e-5)
    tab.evaluate("__jaxclt.select(__jaxclt.app.model.logits[0].id)")
    tab.click("details.paths summary")
    said = tab.locator("button.path .right").all_text_contents()
    assert f"{100 * paths[0].strength:.2g} %" in said


def test_a_graph_differs_from_itself_in_nothing(open_page):
    doc = graph_json(make_graph(), slug="x")
    tab = open_page(page(doc, other=copy.deepcopy(doc)))
    tab.click("#view-compare")
    said = tab.text_content("#comparetabs")
    assert "Nodes that differ (0)Links that differ (0)" in said
    assert tab.locator("#comparerows tr").count() == 0
