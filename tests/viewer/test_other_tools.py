"""Graph files of other tools open: slugs, labels, output layers, order of keys."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from test_foreign_files import KINDS
from test_graph_json import make_graph
from test_page import open_file

from jaxclt.errors import InputError
from jaxclt.serve.folder import Folder
from jaxclt.serve.save import save_view
from jaxclt.trace.pages import directory_page, read_graph
from jaxclt.viewer.graph_json import graph_json, validate
from jaxclt.viewer.page import page

FORMS = {  # of an output: its layer, and its label with {t} for the token
    "attribute": ("-1", 'output: "{t}" (p=0.5)'),
    "number": (-1, 'output: "{t}" (p=0.5)'),
    "word": ("logit", "{t} (p=0.5)"),
    "plain": ("27", "{t}"),
}


def foreign(form: str) -> dict:
    """Our document in another tool's words."""
    doc = graph_json(make_graph(), slug="x")
    doc["metadata"]["slug"] = "my graph"
    layer, label = FORMS[form]
    for node in doc["nodes"]:
        if node["feature_type"] == "logit":
            token = node["clerp"].split('"')[1]
            node |= {"layer": layer, "clerp": label.format(t=token)}
    del doc["jaxclt"]
    return doc


@pytest.mark.parametrize("form", FORMS)
def test_they_open_in_every_way(tmp_path: Path, form: str):
    doc = foreign(form)
    (tmp_path / "graph.json").write_text(json.dumps(doc))
    assert read_graph(tmp_path / "graph.json") == doc
    assert "my graph" in directory_page(tmp_path)
    assert "my graph" in directory_page(tmp_path, compare=doc)
    pin = doc["nodes"][0]["node_id"]
    save_view(tmp_path / "graph.json", {"qParams": {"pinnedIds": [pin]}})
    assert read_graph(tmp_path / "graph.json")["qParams"]["pinnedIds"] == [pin]


PLACES = "__jaxclt.nodes.map(n => [n.id, n.kind, n.band, n.token])"


@pytest.mark.parametrize("form", FORMS)
def test_their_nodes_are_placed_by_type(open_page, form: str):
    """As a page and by the button: tokens at the bottom, outputs at the top."""
    doc = foreign(form)
    top = 27 if form == "plain" else 4  # which says how many layers there are
    want = []
    for node in doc["nodes"]:
        kind = KINDS[node["feature_type"]]
        band = {"embedding": 0, "logit": top}.get(kind)
        band = int(node["layer"]) + 1 if band is None else band
        token = node["clerp"] if form == "word" else node["clerp"].split('"')[-2:][0]
        want.append([node["node_id"], kind, band, token if kind == "logit" else ""])
    tab = open_page(page(doc))
    assert tab.evaluate(PLACES) == want
    assert tab.evaluate("__jaxclt.app.model.source.length") == len(doc["links"])
    tab = open_page(page(graph_json(make_graph(n_features=20), slug="x")))
    open_file(tab, "other.json", doc)
    tab.wait_for_function(f"() => __jaxclt.nodes.length === {len(want)}")
    assert tab.evaluate(PLACES) == want
    validate(tab.evaluate("__jaxclt.document()"), foreign=True)


@pytest.mark.parametrize("kind", ["feature", "error"])
def test_a_feature_without_a_layer_is_refused(kind: str):
    doc = foreign("attribute")
    next(n for n in doc["nodes"] if KINDS[n["feature_type"]] == kind)["layer"] = "-1"
    with pytest.raises(InputError, match=r"nodes\[\d+\]\.layer: '-1'"):
        validate(doc, foreign=True)


def test_our_own_files_keep_their_form():
    doc = graph_json(make_graph(), slug="x")
    for change in (
        lambda d: d["metadata"].update(slug="my graph"),
        lambda d: d["nodes"][-1].update(layer="-1"),
        lambda d: d["nodes"][-1].update(clerp='output: "x" (p=0.5)'),
    ):
        other = copy.deepcopy(doc)
        change(other)
        validate(other, foreign=True)
        with pytest.raises(InputError):
            validate(other)


def test_a_file_with_its_keys_in_any_order_is_listed(tmp_path: Path):
    doc = foreign("attribute")
    many = {**doc, "links": doc["links"] * 1000}  # far more than a look at the start
    orders = {
        "sorted.json": json.dumps(many, sort_keys=True),
        "spaced.json": json.dumps(many, sort_keys=True, indent=1),
        "usual.json": "\ufeff" + json.dumps(many),
        "backwards.json": json.dumps(dict(reversed(many.items()))),
    }
    for name, text in orders.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "cfg.json").write_text('{"d_in": 8, "metadata": {"slug": "no graph"}}')
    (tmp_path / "list.json").write_text('[{"metadata": {}, "nodes": [], "links": []}]')
    found = Folder(tmp_path).graphs()
    assert [g["path"] for g in found] == sorted(orders)
    assert {g["slug"] for g in found} == {"my graph"}
    assert {g["prompt"] for g in found} == {doc["metadata"]["prompt"]}
