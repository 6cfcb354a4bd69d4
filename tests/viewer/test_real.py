"""Every part of the page on a really traced graph: JAXCLT_TRACED=DIR pytest ...

DIR is made by (a larger graph has more links than a page holds, and other marks):

    jaxclt trace "The Eiffel Tower is in the city of" --model smollm2-135m \
        --dictionary neurons:32 --max-features 512 --heads 2000 --validate --out DIR
    jaxclt features --model smollm2-135m --dictionary neurons --data TEXT --out OTHER
    ln -s OTHER/features DIR/features
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_foreign_files import KINDS, links_of
from test_layout import MEASURE
from test_page import FEATURE, ids_of, merged, open_file, totals_of
from test_serve import TOKEN
from test_serve_patch import serving

from jaxclt.api import show
from jaxclt.dashboards.files import FeatureFiles, uncantor
from jaxclt.io.graph_file import load_graph
from jaxclt.serve.patch import Patcher
from jaxclt.trace.pages import directory_page, read_graph, with_suggestions
from jaxclt.viewer.graph_json import validate

TRACED = os.environ.get("JAXCLT_TRACED")
pytestmark = pytest.mark.skipif(TRACED is None, reason="JAXCLT_TRACED names no trace")
FOLDER = Path(str(TRACED))


@pytest.fixture(scope="module")
def doc() -> dict:
    graph = load_graph(FOLDER / "graph.npz")
    return with_suggestions(read_graph(FOLDER / "graph.json"), graph)


@pytest.fixture(scope="module")
def html(doc) -> str:
    return directory_page(FOLDER, doc=doc, compare=doc)


def strongest(doc: dict, *, parts: tuple[str, ...] = ("direct", "heads")) -> dict:
    """The feature with the most inputs among those that say how they travelled."""
    known = [link for link in doc["links"] if all(part in link for part in parts)]
    size = Counter(link["target"] for link in doc["links"])
    ids = {link["target"] for link in known} & set(ids_of(doc, FEATURE))
    best = max(ids, key=lambda i: size[i])
    return next(n for n in doc["nodes"] if n["node_id"] == best)


def say(tab, size: tuple[int, int]) -> None:
    wrong = tab.evaluate(MEASURE)
    assert wrong == [], f"{size}: {wrong[:5]}"


@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tour(open_page, html, doc, size, scheme, tmp_path: Path):
    """A reader's way through the page; no text over another at any stop."""
    tab = open_page(html, size=size, scheme=scheme)
    total = sum(n["feature_type"] == FEATURE for n in doc["nodes"])
    assert tab.text_content("#count") == f"{min(80, total)} of {total:,} features"
    say(tab, size)
    # The output, its strongest paths, their nodes as a circuit.
    tab.evaluate("__jaxclt.select(__jaxclt.app.model.logits[0].id)")
    assert "Probability" in tab.text_content("#sidebody")
    tab.click("#unpinall")  # the story's groups
    tab.click("details.paths summary")
    tab.locator("button.path").first.click()
    tab.click("text=Pin path")
    say(tab, size)
    cards = tab.locator(".card")
    assert cards.count() >= 2
    for i in range(2):
        cards.nth(i).click(modifiers=["Shift"])
    tab.click("#group")
    assert "supernode of 2 nodes" in tab.text_content("#sidebody")
    node = strongest(doc, parts=())["node_id"]
    tab.evaluate("id => __jaxclt.select(id)", node)
    tab.click(".actions >> text=Patch")
    say(tab, size)
    tab.click("#patched >> text=Close")
    tab.click("#tab-evidence")
    say(tab, size)
    tab.click("#view-compare")
    assert f"Shared ({len(doc['nodes'])})" in tab.text_content("#comparetabs")
    say(tab, size)
    tab.click("#view-table")
    assert tab.locator("#rows tr").count() > 10
    say(tab, size)
    tab.click("#view-graph")
    tab.screenshot(path=tmp_path / f"{size[0]}_{scheme}.png")


def test_graph(open_page, html, doc):
    """Places, glyphs, signs, hover, selection, slider, errors, search, zoom, labels."""
    tab = open_page(html)
    nodes = {n["node_id"]: n for n in doc["nodes"]}
    where = tab.evaluate(
        "Object.fromEntries(__jaxclt.nodes.map(n => [n.id, __jaxclt.where(n.id)]))"
    )
    place = {i: (p["x"], p["y"]) for i, p in where.items()}
    for a, b in list(zip(nodes, list(nodes)[1:], strict=False))[::7]:
        one, two = nodes[a], nodes[b]
        if one["ctx_idx"] != two["ctx_idx"]:
            assert (one["ctx_idx"] < two["ctx_idx"]) == (place[a][0] < place[b][0])
        if {"E", one["layer"]} != {"E", two["layer"]} and one["layer"] != two["layer"]:
            higher = int(one["layer"].replace("E", "-1")) > int(
                two["layer"].replace("E", "-1")
            )
            assert higher == (place[a][1] < place[b][1])
    # One path or rect for a glyph, circles for features and diamonds for errors.
    tab.check("#errors")
    root = ElementTree.fromstring(tab.evaluate("__jaxclt.svg()"))
    drawn = [e.get("d", "") for e in root.iter() if e.get("fill") not in (None, "none")]
    ids = tab.evaluate("__jaxclt.nodes.filter(__jaxclt.app.shows).map(n => n.id)")
    count = Counter(KINDS[nodes[i]["feature_type"]] for i in ids)
    assert count["feature"] >= 80
    assert sum("a" in d for d in drawn) == count["feature"]
    assert sum(d.count("L") == 3 for d in drawn) == count["error"] > 0


def test_node(open_page, html, doc):
    """Hover, select, lists with shares, raw weights, parts and heads, paths, label."""
    tab = open_page(html)
    node = strongest(doc)
    at = tab.evaluate("id => __jaxclt.where(id)", node["node_id"])
    tab.mouse.move(at["x"], at["y"])
    assert "influence rank" in tab.text_content("#tip")
    tab.evaluate("id => __jaxclt.select(id)", node["node_id"])
    inputs = [link for link in doc["links"] if link["target"] == node["node_id"]]
    assert f"Inputs ({len(inputs)})" in tab.text_content("#side")
    rows = tab.locator("ul[aria-label=Inputs] li > button")
    first = max(inputs, key=lambda link: abs(link["weight"]))
    total = totals_of(doc)[node["node_id"]]
    share = f"{100 * abs(first['weight']) / total:.0f} %"
    text = rows.first.text_content()
    assert share in text or abs(first["weight"]) / total < 0.1
    assert f"{abs(first['weight']):.3g}" in text
    listed = " ".join(tab.locator("ul[aria-label=Inputs] li").all_text_contents())
    assert re.search(r"residual .* attention .* L\d+H\d", listed)
    assert {t[0] for t in rows.all_text_contents()} == {"+", "−"}
    root = ElementTree.fromstring(tab.evaluate("__jaxclt.svg()"))
    dashed = [e for e in root.iter() if e.get("stroke-dasharray") == "5 3"]
    assert 0 < len(dashed) < len(inputs) + 60
    assert tab.locator(".legend:visible span").count() >= 6
    tab.click("details.paths summary")
    tab.wait_for_selector("button.path")
    assert tab.locator("button.path").count() >= 2
    tab.click(".actions >> text=Label")
    tab.keyboard.type("a label of mine")
    tab.keyboard.press("Enter")
    assert tab.text_content("#side h2") == "a label of mine"
    tab.keyboard.press("Escape")
    tab.fill("#search", "label of mine")
    assert tab.text_content("#found").split()[0] != "0"
    tab.keyboard.press("Enter")
    assert tab.evaluate("__jaxclt.state.selected.key") == "_".join(
        node["node_id"].split("_")[:2]
    )


def test_what_is_shown(open_page, html, doc):
    """Influence slider, errors, zoom and pan."""
    tab = open_page(html)
    node = strongest(doc)
    at = tab.evaluate("id => __jaxclt.where(id)", node["node_id"])
    tab.fill("#slider", "0.3")
    few = int(tab.text_content("#count").split()[0].replace(",", ""))
    assert few < len(doc["nodes"])
    tab.check("#errors")
    assert tab.evaluate(
        "__jaxclt.nodes.some(n => n.kind === 'error' && __jaxclt.app.shows(n))"
    )
    before = tab.evaluate("id => __jaxclt.where(id)", node["node_id"])
    tab.click("#zoomin")
    after = tab.evaluate("id => __jaxclt.where(id)", node["node_id"])
    assert before != after
    tab.mouse.move(at["x"], at["y"] - 5)
    tab.mouse.wheel(40, 0)
    assert tab.evaluate("id => __jaxclt.where(id)", node["node_id"]) != after
    tab.click("#zoomfit")


def test_subgraph(open_page, html, doc):
    """Suggested supernodes, links merged, grouped, renamed, dragged, ungrouped."""
    tab = open_page(html)
    tab.click("#unpinall")
    tab.click("#suggest")
    groups = tab.evaluate("__jaxclt.app.groups.map(g => g.ids)")
    suggested = {tuple(g[1:]) for g in doc["jaxclt"]["suggested_supernodes"]}
    assert set(map(tuple, groups)) == suggested
    cards = tab.evaluate("__jaxclt.cards().map(c => c.members.map(n => n.id))")
    links = tab.evaluate("__jaxclt.cardLinks().map(l => [l.source, l.target, l.share])")
    expected = merged(doc, cards)
    assert len(links) == len(expected) > 3
    for s, t, share in links:
        assert share == pytest.approx(expected[s, t], rel=1e-4, abs=1e-7)
    card = tab.locator(".card").first
    card.click()
    tab.click(".actions >> text=Rename")
    tab.keyboard.type("mine")
    tab.keyboard.press("Enter")
    assert tab.text_content("#side h2") == "mine"
    box = card.bounding_box()
    tab.mouse.move(box["x"] + 10, box["y"] + 8)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 40, box["y"] + 20, steps=3)
    tab.mouse.up()
    assert card.bounding_box()["x"] - box["x"] == pytest.approx(30, abs=3)
    tab.click(".actions >> text=Ungroup")
    assert tab.evaluate("__jaxclt.app.groups.length") == len(groups) - 1


def test_feature_panel(open_page, html, doc):
    """Embedded for the shown features; opened from a file for a page without them."""
    files = FeatureFiles(FOLDER / "features")
    numbers = {n["feature"]: n for n in doc["nodes"] if n["feature_type"] == FEATURE}
    number, record = next(
        (k, r) for k in numbers if (r := files.record(*uncantor(k))) is not None
    )
    tab = open_page(html)
    for way in ("embedded", "opened"):
        if way == "opened":
            bare = {**doc, "jaxclt": {**doc["jaxclt"], "features": {}}}
            tab = open_page(directory_page(FOLDER.parent / "nowhere", doc=bare))
        tab.evaluate("id => __jaxclt.select(id)", numbers[number]["node_id"])
        if way == "opened":
            assert tab.locator(".feature:not(.says)").count() == 0
            open_file(tab, f"{number}.json", record)
            tab.wait_for_selector(".feature:not(.says)")
        assert tab.locator(".feature .example").count() > 3
        assert tab.locator(".histogram .column").count() == len(record["histogram"])
        raised = "bottom" if numbers[number]["activation"] < 0 else "top"
        first = record[f"{raised}_logits"][0].strip()
        logits = tab.locator(".feature .logits").all_text_contents()
        assert first in " ".join(logits)
        assert tab.locator(".example .up, .example .down").count() > 3


def test_evidence(open_page, html):
    """Scores, certificate and validation beside the graph."""
    report = json.loads((FOLDER / "report.json").read_text())
    validation = json.loads((FOLDER / "validation.json").read_text())
    tab = open_page(html)
    assert "How far to trust it" in tab.text_content("#trust")
    tab.click("#tab-evidence")
    text = tab.text_content("#sidebody")
    full = report["scores"]["full"]
    assert f"{100 * full['replacement']:.0f} %" in text
    assert "rounding only" in text
    assert validation["verdict"] in text
    assert "Patched supernodes" in text
    assert tab.locator("svg.chart").count() == 1


def test_state_and_files(open_page, html, doc):
    """The view in the address, the file out and in again."""
    tab = open_page(html)
    tab.click("#suggest")
    node = strongest(doc)["node_id"]
    tab.evaluate("id => __jaxclt.select(id)", node)
    tab.wait_for_function("() => location.hash.includes('clickedId')")
    tab = open_page(html, hash=tab.evaluate("location.hash"))
    assert tab.evaluate("__jaxclt.state.selected.id") == node
    assert tab.locator(".card").count() > 3
    for kind in ("graph.svg", "graph.png", "json"):
        with tab.expect_download() as download:
            tab.select_option("#export", kind)
        data = Path(download.value.path()).read_bytes()
        assert len(data) > 10_000
    made = json.loads(data)
    validate(made)
    assert made["links"] == doc["links"]
    foreign = json.loads(data)
    foreign.pop("jaxclt")
    tab = open_page(html)
    open_file(tab, "other.json", foreign)
    tab.wait_for_function("() => __jaxclt.app.groups.length > 0")
    assert links_of(tab.evaluate("__jaxclt.document()")) == links_of(doc)


def test_served_saved_and_patched(open_url, doc, tmp_path: Path):
    """`jaxclt serve` with the model: a suggested supernode is ablated in it."""
    folder = tmp_path / "runs" / "eiffel"
    names = ("graph.npz", "report.json", "validation.json")
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(FOLDER / name, folder)
    (folder / "graph.json").write_text(json.dumps(doc))
    report = json.loads((FOLDER / "report.json").read_text())
    patcher = Patcher(report["model"], report["dictionary"])
    with serving(tmp_path / "runs", patcher) as port:
        origin = f"http://127.0.0.1:{port}"
        tab = open_url(f"{origin}/?token={TOKEN}", origin)
        tab.locator("tbody a").first.click()
        tab.click("#suggest")
        tab.locator(".card.group").first.click()
        tab.click(".actions >> text=Patch")
        tab.click(".patchform >> text=Run")
        tab.wait_for_selector("#patched .result, #patched .bad", timeout=300_000)
        assert tab.locator("#patched .result tbody tr").count() >= 5
        tab.click("#save")
        tab.wait_for_selector("#notice:has-text('Saved')")
    saved = read_graph(folder / "graph.json")
    assert len(saved["qParams"]["supernodes"]) > 0
    (record,) = json.loads((folder / "patches.json").read_text())["patches"]
    assert record["kl"] > 0
    page = directory_page(folder)
    assert json.dumps(record["kl"])[:8] in page


def test_in_a_notebook(open_page):
    tab = open_page(show(load_graph(FOLDER / "graph.npz")).html)
    assert "features" in tab.text_content("#count")
