"""The page: nothing of a token reaches the HTML parser, nothing is loaded, it works."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_graph_json import HOSTILE, make_graph

from jaxclt.errors import InputError
from jaxclt.viewer.graph_json import graph_json
from jaxclt.viewer.page import page

REPORT = {
    "scores": {
        "full": {"replacement": 0.62, "completeness": 0.84, "mean_path_length": 3.4},
        "pruned": {"replacement": 0.48, "completeness": 0.79},
    },
    "certificate": {
        "max_relative_row_error": 3e-6,
        "bias_share": 0.08,
        "rest_share": 0.01,
        "error_share": float("nan"),
    },
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def doc() -> dict:
    return graph_json(make_graph(), slug="cat")


@pytest.fixture(scope="module")
def hostile() -> dict:
    return graph_json(make_graph(tokens=HOSTILE, targets=HOSTILE), slug="hostile")


def data_of(html: str) -> dict:
    block = html.split('id="data">', 1)[1].split("</script>", 1)[0]
    return json.loads(block)


def test_a_page_of_too_many_links_holds_the_strongest_and_says_so(doc, monkeypatch):
    monkeypatch.setattr("jaxclt.viewer.page.MAX_LINKS", 3)
    data = data_of(page(doc))
    assert data["graph"]["links"] == doc["links"][:3]
    assert data["allLinks"] == len(doc["links"]) > 3


def test_data_comes_back_whole(doc):
    data = data_of(page(doc, REPORT))
    assert data["graph"] == doc
    assert data["report"]["scores"] == REPORT["scores"]
    assert data["report"]["certificate"]["error_share"] is None


def test_hostile_text_neither_ends_the_block_nor_appears_raw(doc, hostile):
    assert page(hostile).count("<") == page(doc).count("<")
    html = page(hostile)
    assert "onerror" in html
    assert "<img" not in html
    assert "\u2028" not in html
    assert data_of(html)["graph"] == hostile
    html.encode()


def test_the_marker_inside_a_token_is_only_a_token():
    doc = graph_json(make_graph(tokens=("/*DATA*/null", "a", "b", "c")), slug="x")
    assert data_of(page(doc))["graph"] == doc


def test_scores_in_the_document_stand_in_for_a_report():
    doc = graph_json(make_graph(), slug="x", scores=REPORT["scores"])
    assert data_of(page(doc))["report"] == REPORT["scores"]


def test_page_loads_nothing_and_forbids_it(doc):
    html = page(doc, REPORT)
    assert not re.search(r"""(src|href|url\(|import|fetch)\W*https?:""", html)
    assert "http://" not in html
    assert "https://" not in html
    assert "default-src 'none'" in html
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"):
        assert sink not in html


def test_page_has_language_title_heading_and_main(doc):
    html = page(doc)
    for part in ('<html lang="en">', "<title>", "<h1", "<main", "aria-live"):
        assert part in html


def test_a_document_json_cannot_hold_is_refused(doc):
    with pytest.raises(InputError, match="cannot be shown"):
        page({**doc, "extra": float("nan")})


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-quic", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path: Path):
    """Open HTML from a file; any error or request in it fails the test."""
    problems: list[str] = []
    tabs = []

    def load(html: str, **options):
        path = tmp_path / "index.html"
        path.write_text(html, encoding="utf-8")
        tab = browser.new_page(viewport={"width": 1200, "height": 800}, **options)
        tabs.append(tab)
        tab.on("pageerror", lambda e: problems.append(f"error: {e}"))
        tab.on("console", lambda m: m.type == "error" and problems.append(m.text))
        tab.on("dialog", lambda d: (problems.append("dialog"), d.dismiss()))
        tab.on(
            "request",
            lambda r: (
                r.url == path.as_uri()
                or r.url.startswith("data:")
                or problems.append(r.url)
            ),
        )
        tab.goto(path.as_uri())
        return tab

    yield load
    for tab in tabs:
        tab.close()
    assert problems == []


def most_read(doc: dict, kind: str) -> str:
    """The node of a kind that most links point to."""
    targets = [link["target"] for link in doc["links"]]
    ids = [n["node_id"] for n in doc["nodes"] if n["feature_type"] == kind]
    return max(ids, key=targets.count)


def test_click_shows_inputs_and_outputs(open_page, doc):
    tab = open_page(page(doc, REPORT))
    assert "62 %" in tab.text_content("#scores")
    assert "0.0003 %" in tab.text_content("#scores")
    node = most_read(doc, "cross layer transcoder")
    at = tab.evaluate("id => window.__jaxclt.where(id)", node)
    tab.mouse.move(at["x"], at["y"])
    assert tab.is_visible("#tip")
    tab.mouse.click(at["x"], at["y"])
    assert tab.evaluate("window.__jaxclt.state.selected.id") == node
    n_inputs = sum(link["target"] == node for link in doc["links"])
    assert f"Inputs ({n_inputs})" in tab.text_content("#side")
    rows = tab.locator("ul[aria-label=Inputs] button")
    assert rows.count() == n_inputs
    assert rows.first.locator(".sign").text_content()[0] in "+−"
    rows.first.click()
    assert tab.evaluate("window.__jaxclt.state.selected.id") != node
    tab.keyboard.press("Escape")
    assert tab.evaluate("window.__jaxclt.state.selected") is None


def test_targets_of_other_kinds_are_not_called_outputs(open_page) -> None:
    """A weight is no probability, and a feature is nothing the model says next."""
    graph = make_graph(targets=("<b>L1</b> feature 9", " on"), target_token=(-1, 7))
    graph = dataclasses.replace(
        graph,
        target_layer_K=np.array([1, 3], np.int32),
        target_pos_K=np.array([2, 1], np.int32),
    )
    doc = graph_json(graph, slug="cat")
    tab = open_page(page(doc, REPORT))
    assert "What the graph explains" in tab.text_content("#side")
    assert "→" not in tab.text_content("#h1")
    for i, what in ((0, "Target “<b>L1</b> feature 9”"), (1, "Output “ on”")):
        node = [n for n in doc["nodes"] if n["feature_type"] == "logit"][i]
        tab.evaluate("id => window.__jaxclt.select(id)", node["node_id"])
        side = tab.text_content("#side")
        assert what in side
        assert "Weight" in side
        assert "Probability" not in side
        assert ("layer 1, position 2" if i == 0 else "after position 1") in side
    tab = open_page(page(graph_json(make_graph(), slug="cat"), REPORT))
    assert "What the model says next" in tab.text_content("#side")
    assert "→" in tab.text_content("#h1")


def test_shares_of_a_nodes_inputs_sum_to_one(open_page, doc):
    tab = open_page(page(doc))
    sums = tab.evaluate(
        "window.__jaxclt.nodes.filter(n => n.ins.length)"
        ".map(n => n.ins.reduce((s, l) => s + l.share, 0))"
    )
    assert sums == pytest.approx([1.0] * len(sums))


def test_keyboard_reaches_every_view(open_page, doc):
    tab = open_page(page(doc))
    tab.focus("#graph")
    for key in ("ArrowUp", "ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    assert tab.evaluate("window.__jaxclt.state.selected.id")
    assert "inputs" in tab.text_content("#live")
    tab.keyboard.press("/")
    tab.keyboard.type("sat")
    assert "match" in tab.text_content("#found")
    tab.keyboard.press("Enter")
    assert tab.evaluate("window.__jaxclt.state.selected.pos") == 3
    tab.focus("#asTable")
    tab.keyboard.press("Enter")
    assert tab.is_visible("#rows tr")
    assert not tab.is_visible("#graph")


def test_slider_hides_the_least_influential(open_page, doc):
    tab = open_page(page(doc))
    total = len(doc["nodes"])
    assert f"of {total} nodes" in tab.text_content("#count")
    tab.fill("#slider", "0")
    fixed = sum(n["feature_type"] in ("embedding", "logit") for n in doc["nodes"])
    assert f"showing {fixed} of" in tab.text_content("#count")


def test_hostile_tokens_stay_text(open_page, hostile):
    tab = open_page(page(hostile), color_scheme="dark")
    tab.evaluate("window.__jaxclt.nodes.forEach(n => window.__jaxclt.select(n.id))")
    tab.click("#asTable")
    assert tab.locator("img").count() == 0
    assert HOSTILE[0] in tab.text_content("#tokens")


def test_one_layer_and_no_links_still_draw(open_page):
    graph = make_graph(n_layers=1, n_features=3, tokens=("a",), n_links=0)
    tab = open_page(page(graph_json(graph, slug="x")))
    assert "showing" in tab.text_content("#count")
