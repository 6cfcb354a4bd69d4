"""Files that circuit-tracer 0.5.0 wrote itself open, with both ids of errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from test_graph_json import make_graph
from test_page import open_file
from test_serve import TOKEN
from test_serve_patch import serving

from jaxclt.errors import InputError
from jaxclt.trace.pages import directory_page, read_graph
from jaxclt.viewer.graph_json import graph_json, validate
from jaxclt.viewer.page import page

FILES = Path(__file__).parents[1] / "goldens" / "circuit_tracer_files"
KINDS = {
    "cross layer transcoder": "feature",
    "mlp reconstruction error": "error",
    "embedding": "embedding",
    "logit": "logit",
}
# What a node is, whatever its id: kind, layer, position, feature.
SHOWN = "[n.kind, n.layer, n.pos, n.kind === 'feature' ? Number(n.number) : -1]"


@pytest.fixture(scope="module")
def docs() -> dict[str, dict]:
    return {
        name: json.loads((FILES / f"{name}.json").read_text())
        for name in ("shipped", "newer")
    }


def node_of(node: dict) -> tuple:
    kind = KINDS[node["feature_type"]]
    layer = -1 if kind == "embedding" else int(node["layer"])
    number = int(node["node_id"].split("_")[1]) if kind == "feature" else -1
    return kind, layer, node["ctx_idx"], number


def links_of(doc: dict) -> Counter:
    by_id = {node["node_id"]: node_of(node) for node in doc["nodes"]}
    return Counter(
        (by_id[link["source"]], by_id[link["target"]], link["weight"])
        for link in doc["links"]
    )


def shown(tab) -> tuple[Counter, Counter]:
    """Nodes and links of the page."""
    nodes = tab.evaluate(f"__jaxclt.nodes.map(n => {SHOWN})")
    links = tab.evaluate(
        "(({model: m}) => [...m.source.keys()].map(e => [m.source[e], m.target[e], "
        "m.weight[e]]))(__jaxclt.app)"
    )
    return Counter(map(tuple, nodes)), Counter(
        (tuple(nodes[s]), tuple(nodes[t]), w) for s, t, w in links
    )


def test_the_goldens_are_of_both_styles(docs):
    ids = [n["node_id"] for n in docs["shipped"]["nodes"]]
    assert len(set(ids)) < len(ids)
    with pytest.raises(InputError, match="used twice"):
        validate(docs["shipped"])
    validate(docs["newer"])
    for style, name in (("shipped", "0_{l}_{p}"), ("newer", "{l}_-1_{p}")):
        for node in docs[style]["nodes"]:
            if node["feature_type"] == "mlp reconstruction error":
                place = {"l": node["layer"], "p": node["ctx_idx"]}
                assert node["node_id"] == name.format(**place)


@pytest.mark.parametrize("style", ["shipped", "newer"])
def test_files_of_circuit_tracer_open(open_page, docs, style):
    """By the button, and as a page; all links at their nodes, where ids collide too."""
    made = docs[style]
    tab = open_page(page(graph_json(make_graph(), slug="x")))
    open_file(tab, f"{style}.json", made)
    tab.wait_for_function(f"() => __jaxclt.nodes.length === {len(made['nodes'])}")
    for _ in range(2):
        nodes, links = shown(tab)
        assert nodes == Counter(map(node_of, made["nodes"]))
        # Of a link with an id that two nodes have, only the other file tells the truth.
        assert links == links_of(docs["newer"])
        assert "share" not in (tab.text_content("#notice") or "")
        exported = tab.evaluate("__jaxclt.document()")
        validate(exported)
        assert links_of(exported) == links_of(docs["newer"])
        tab.evaluate("__jaxclt.nodes.forEach(n => __jaxclt.select(n.id))")
        assert tab.locator("ul[aria-label=Inputs] button").count() > 0
        if style == "newer":
            tab = open_page(page(made))
        else:
            assert "before 0.5.1" in tab.text_content("#notice")
            tab = open_page(page(made))
            assert "before 0.5.1" in tab.text_content("#notice")


def test_they_are_served_and_saved(open_url, docs, tmp_path: Path):
    for style, doc in docs.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(doc))
    (tmp_path / "graph-metadata.json").write_text('{"graphs": []}')
    error = next(
        n for n in docs["newer"]["nodes"] if n["feature_type"].endswith("error")
    )["node_id"]
    with serving(tmp_path, None) as port:
        origin = f"http://127.0.0.1:{port}"
        tab = open_url(f"{origin}/?token={TOKEN}", origin)
        assert tab.locator("tbody a").count() == 2
        for style in docs:
            tab.goto(f"{origin}/view/{style}.json")
            assert tab.evaluate("__jaxclt.nodes.length") == len(docs[style]["nodes"])
        tab.evaluate(
            "id => __jaxclt.app.togglePin(__jaxclt.app.model.byId.get(id))", error
        )
        tab.click("#save")
        tab.wait_for_selector("#notice:has-text('Saved')")
    saved = read_graph(tmp_path / "newer.json")
    assert saved["qParams"]["pinnedIds"] == [error]
    assert saved["links"] == docs["newer"]["links"]


def test_a_pinned_error_is_found_under_the_id_of_its_file(open_page, docs):
    shipped = docs["shipped"]
    used = Counter(n["node_id"] for n in shipped["nodes"])
    node = next(
        n
        for n in shipped["nodes"]
        if n["feature_type"].endswith("error") and used[n["node_id"]] == 1
    )
    view = {**shipped["qParams"], "pinnedIds": [node["node_id"]]}
    tab = open_page(page({**shipped, "qParams": view}))
    assert tab.evaluate("__jaxclt.app.pinned") == [
        f"{node['layer']}_-1_{node['ctx_idx']}"
    ]


def test_a_directory_with_such_a_file_makes_a_page(docs, tmp_path: Path):
    (tmp_path / "graph.json").write_text(json.dumps(docs["shipped"]))
    assert "mlp reconstruction error" in directory_page(tmp_path)
