"""The page's attention tab: heads, patterns, cells taken apart, and their nodes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from test_graph_json import HOSTILE, make_graph
from test_page import FEATURE, ids_of, violations

from jaxclt.api import show
from jaxclt.trace.pages import write_page
from jaxclt.viewer.graph_json import graph_json
from jaxclt.viewer.page import page

OPEN = "void __jaxclt.app.openHead([1, 0])"


def make_attention(doc: dict, words: str = "") -> dict:
    """Two heads taken apart, of the many there are; `words` are in every text.

    Head 1.0 has a pattern of which every weight is another number.
    """
    tokens = doc["metadata"]["prompt_tokens"]
    features, T = ids_of(doc, FEATURE), len(tokens)
    rows = [[(k + 1) / sum(range(q + 2)) for k in range(q + 1)] for q in range(T)]
    query, key = features[:8], features[8:16]

    def cell(head: int, at: tuple[int, int], effect: float) -> dict:
        sides = [[n, f"named {n}", 2.0 - i / 4] for i, n in enumerate(query)]
        return {
            "layer": 1,
            "head": head,
            "query": at[0],
            "key": at[1],
            "weight": rows[at[0]][at[1]],
            "score": 3.25,
            "effect": effect,
            "pattern_effect": -0.125,
            "pattern": rows[at[0]],
            "text": f"L1H{head} at {tokens[at[0]]!r} attends{words} because",
            "query_nodes": [*sides, ["bias", f"bias{words}", -0.5]],
            "key_nodes": [[n, f"named {n}", 1.5] for n in key],
            "pairs": [
                [query[0], key[0], "q", "k", 1.5, 0.75],
                ["bias", key[1], f"bias{words}", "k", -0.625, -0.5],
                *[[query[1], "9_9_9", "q", f"gone{words}", 0.1, None]] * 10,
            ],
            "relative_error": 2e-7,
            "competition_error": 1e-7,
        }

    return {
        "prompt": doc["metadata"]["prompt"],
        "dictionary": doc["jaxclt"]["dictionary"],
        "tokens": tokens,
        "contrast": f"logit( on){words} - logit( at)",
        "heads": [
            {"layer": 2, "head": 3, "effect": -0.25},
            {"layer": 1, "head": 0, "effect": 0.75},
            *[{"layer": 0, "head": h, "effect": 0.01} for h in range(40)],
        ],
        "cells": [cell(0, (3, 1), 0.5), cell(0, (2, 2), -0.25), cell(1, (1, 0), 0.1)],
        "patterns": {"1.0": rows},
    }


@pytest.fixture(scope="module")
def doc() -> dict:
    doc = graph_json(make_graph(), slug="cat")
    for link in doc["links"]:
        link |= {"attention": 0.5, "heads": [[1, 0, 0.5], [2, 3, -0.25]]}
    return doc


@pytest.fixture(scope="module")
def html(doc) -> str:
    return page(doc, attention=make_attention(doc))


def side(tab) -> str:
    return tab.text_content("#sidebody")


def test_a_head_opens_from_the_list_a_cell_a_link_and_the_address(open_page, html, doc):
    tab = open_page(html)
    tab.click("#tab-attention")
    assert "What heads do for logit( on) - logit( at)" in side(tab)
    heads = tab.locator("ul[aria-label^=Heads] button")
    assert heads.all_text_contents()[:2] == ["L1H0+0.75", "L2H3−0.25"]
    assert heads.count() == 12
    tab.click("text=Show all 42")
    assert heads.count() == 42
    heads.nth(1).click()
    assert "Layer 2, head 3" in side(tab)
    assert "None of its cells is taken apart" in side(tab)
    tab.click("text=All heads")
    tab.locator("ul[aria-label='Strongest cells'] button").nth(1).click()
    assert tab.evaluate("document.activeElement.textContent") == "Layer 1, head 0"
    assert "+0.75 on logit( on) - logit( at), rank 1 of 42" in side(tab)
    assert tab.evaluate("__jaxclt.app.cell") == [2, 2]
    tab.wait_for_function("() => location.hash.includes('attention=1.0.2.2')")
    again = open_page(html, hash=tab.evaluate("location.hash"))
    assert "“ cat” attends to “ cat”" in side(again)
    tab.evaluate("id => __jaxclt.select(id)", ids_of(doc, "logit")[0])
    row = tab.locator("ul[aria-label=Inputs] li").first
    assert row.locator("button.inline").all_text_contents() == [
        "L1H0 +0.5",
        "L2H3 −0.25",
    ]
    row.locator("button.inline").first.click()
    assert "Layer 1, head 0" in side(tab)
    assert tab.evaluate("__jaxclt.app.cell") == [3, 1]  # its strongest


def test_the_matrix_has_the_weights_and_is_read_by_pointer_and_keys(
    open_page, html, doc
):
    tab = open_page(html)
    tab.evaluate(OPEN)
    rows = make_attention(doc)["patterns"]["1.0"]
    drawn = tab.eval_on_selector_all(
        ".matrix .weight",
        "l => l.map(e => [e.dataset.at, e.getAttribute('fill-opacity')])",
    )
    want = {f"{q} {k}": w**0.5 for q, row in enumerate(rows) for k, w in enumerate(row)}
    assert {at: float(shade) for at, shade in drawn} == pytest.approx(want, abs=1e-3)
    assert tab.locator(".matrix .listed").count() == 2
    assert tab.locator(".matrix text").all_text_contents() == [
        "<bos>",
        "The",
        "·cat",
        "·sat",
    ]
    at = tab.locator(".matrix .weight[data-at='3 2']").bounding_box()
    tab.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    assert tab.text_content(".said") == "“ sat” at 3 attends to “ cat” at 2: 30 %"
    tab.mouse.click(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    assert tab.evaluate("__jaxclt.app.cell") == [3, 2]
    assert "layer=1, head=0, query=3, key=2" in tab.text_content(".details")
    tab.mouse.move(5, 5)
    tab.focus(".matrix")
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "Home"):
        tab.keyboard.press(key)  # stays in the triangle
    assert tab.text_content(".said") == "“ cat” at 2 attends to “<bos>” at 0: 17 %"
    tab.keyboard.press("End")
    tab.keyboard.press("Enter")
    pressed = tab.locator("#sidebody button[aria-pressed=true]")
    assert pressed.all_text_contents() == ["L1H0 at '\xa0cat' attends because−0.25"]
    assert "“ cat” attends to “ cat”" in tab.text_content(".details")


def test_pairs_select_their_nodes_and_nodes_say_where_they_take_part(
    open_page, html, doc
):
    tab = open_page(html)
    tab.evaluate(OPEN)
    query, key = ids_of(doc, FEATURE)[0], ids_of(doc, FEATURE)[8]
    pairs = tab.locator(".product")
    assert pairs.count() == 10
    first = pairs.first
    assert "+0.75" in first.text_content()
    assert first.text_content().endswith("+1.5")
    for i, node in enumerate((query, key)):
        first.locator("button.node").nth(i).click()
        assert tab.evaluate("__jaxclt.app.selected.id") == node
        assert "Layer 1, head 0" in side(tab)
    assert pairs.nth(1).locator("button.node").count() == 1  # bias is no node
    assert pairs.nth(2).locator("button.node").count() == 1  # nor what is not shown
    assert "within 0.00002 %" in side(tab)
    assert tab.locator("ul[aria-label='What asks'] li").count() == 8
    ringed = tab.evaluate("[...__jaxclt.app.attending()]")
    assert query in ringed
    tab.click("#tab-node")
    parts = tab.locator("ul[aria-label^='Attention it takes part in'] button")
    assert parts.count() == 3
    assert "answers in L1H0  “ sat” to “The”" in parts.first.text_content()
    parts.nth(2).click()
    assert "Layer 1, head 1" in side(tab)
    assert tab.locator(".matrix").count() == 0
    weights = tab.locator("ul[aria-label='What it attends to'] li")
    assert weights.all_text_contents() == ["“The”  at 167 %", "“<bos>”  at 033 %"]


def test_text_of_any_token_stays_text(open_page):
    doc = graph_json(make_graph(tokens=HOSTILE, targets=HOSTILE), slug="hostile")
    html = page(doc, attention=make_attention(doc, HOSTILE[0]))
    assert html.count("<") == page(doc).count("<")
    tab = open_page(html)
    tab.click("#tab-attention")
    assert f"attends{HOSTILE[0]}" in side(tab)
    tab.evaluate(OPEN)
    assert f"gone{HOSTILE[0]}" in side(tab)
    tab.focus(".matrix")
    tab.keyboard.press("Home")
    assert f"attends to “{HOSTILE[0][:39]}" in tab.text_content(".said")
    assert tab.locator("img, #side script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_it(open_page, html, scheme):
    tab = open_page(html, scheme=scheme)
    for state in ("__jaxclt.app.showTab('attention')", OPEN):
        tab.evaluate(f"void {state}")
        assert violations(tab) == [], state


def test_a_page_shows_the_file_beside_its_graph(tmp_path: Path, doc):
    attention = make_attention(doc)
    (tmp_path / "graph.json").write_text(json.dumps(doc))
    (tmp_path / "attention.json").write_text(json.dumps(attention))
    assert '"attention":{"prompt"' in write_page(tmp_path).read_text()
    other = copy.deepcopy(attention) | {"prompt": "another"}
    (tmp_path / "attention.json").write_text(json.dumps(other))
    assert '"attention":null' in write_page(tmp_path).read_text()
    assert '"attention":{"prompt"' in show(make_graph(), attention=attention).html
