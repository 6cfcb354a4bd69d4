"""No text lies over another, leaves its panel or is cut, at both widths.

What is not HTML, the picture, is measured in its SVG export, which the same code draws.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_attention_panel import OPEN, make_attention
from test_graph_json import make_graph
from test_page import FEATURE, REPORT, VALIDATION, feature_file, ids_of, patched

from jaxclt.viewer.graph_json import graph_json
from jaxclt.viewer.page import page

MEASURE = (Path(__file__).parent / "layout.js").read_text()
SIZES = {"1280": (1280, 800), "1920": (1920, 1080)}
WORDS = [
    "The",
    "tower",
    "of",
    "internationalisation",
    "stands",
    "in",
    "the",
    "city",
    "of",
    "Villefranche",
]
TARGETS = (" Paris", " the", " Villefranche-sur", " a", "\n", " New", " É", " London")


def states(doc: dict) -> dict[str, str]:
    feature = ids_of(doc, FEATURE)[4]
    group = "__jaxclt.app.groups[0]"
    return {
        "as it opens": "0",
        "a feature": f"__jaxclt.select({feature!r})",
        "an output": "__jaxclt.select(__jaxclt.app.model.logits[0].id)",
        "a supernode": f"__jaxclt.app.selectGroup({group})",
        "its patch": f"__jaxclt.app.openPatch({{name: 'x', ids: {group}.ids}})",
        "attention": "__jaxclt.app.showTab('attention')",
        "a head": OPEN,
        "evidence": "__jaxclt.app.showTab('evidence')",
        "help": "__jaxclt.app.showTab('help')",
        "table": "__jaxclt.app.showView('table')",
        "compare": "__jaxclt.app.showView('compare')",
    }


@pytest.fixture(scope="module", params=[10, 60], ids=["short", "long"])
def doc(request) -> dict:
    tokens = tuple(f" {WORDS[i % len(WORDS)]}" for i in range(request.param))
    graph = make_graph(
        n_layers=30,
        n_features=12 * request.param,
        tokens=tokens,
        targets=TARGETS,
        n_links=60 * request.param,
    )
    doc = graph_json(graph, slug="x")
    ids = ids_of(doc, FEATURE)
    for node in doc["nodes"]:
        if node["node_id"] in ids[:20]:
            node["clerp"] = f"say a word of {len(node['node_id'])} letters or more"
    doc["qParams"]["supernodes"] = [["places in the south of France", *ids[:4]]]
    doc["qParams"]["pinnedIds"] = ids[6:9]
    layer, number, _ = ids[4].split("_")
    doc["jaxclt"]["features"] = {f"{layer}_{number}": feature_file(0)}
    return doc


@pytest.mark.parametrize("size", SIZES)
def test_no_text_is_hidden_by_another_or_cut(open_page, doc, size):
    parts = {
        "validation": VALIDATION,
        "attention": make_attention(doc),
        "patches": [patched(doc, ids_of(doc, FEATURE)[:4])],
        "other": doc,
    }
    tab = open_page(page(doc, REPORT, **parts), size=SIZES[size])
    found = {}
    for state, code in states(doc).items():
        tab.evaluate(f"void {code}")
        tab.wait_for_timeout(30)
        if wrong := tab.evaluate(MEASURE):
            found[state] = wrong[:5]
    assert found == {}, json.dumps(found, indent=1)


def test_the_measure_finds_what_is_wrong(open_page, doc):
    """It is no test if it could not fail."""
    tab = open_page(page(doc, REPORT))
    for rule, word in (
        (".legend span { margin-right: -70px; }", "over each other"),
        (".meta { position: relative; left: 400px; }", "outside"),
        ("h3 { height: 6px; overflow: hidden; padding: 0 !important; }", "cut"),
    ):
        style = tab.add_style_tag(content=rule)
        assert any(word in w for w in tab.evaluate(MEASURE)), rule
        style.evaluate("e => e.remove()")
