"""What is exported as a picture: whole, in light colours, its text as text."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_first_picture import prompt, told
from test_graph_json import HOSTILE, make_graph
from test_page import FEATURE, ids_of

from jaxclt.viewer.graph_json import graph_json
from jaxclt.viewer.page import page

LIGHT, DARK = "#1b2026", "#e7eaee"  # ink

# What of a drawing lies outside its view box, as the browser draws it.
OUTSIDE = """text => {
  const host = document.createElement('div');
  host.innerHTML = text;
  host.style.position = 'absolute';
  document.body.append(host);
  const svg = host.querySelector('svg'), whole = svg.getBoundingClientRect();
  const wrong = [];
  for (const e of svg.querySelectorAll('text, rect, path')) {
    if (e.closest('clipPath, marker')) continue;
    const b = e.getBoundingClientRect();
    if (b.left < whole.left - .5 || b.right > whole.right + .5 ||
        b.top < whole.top - .5 || b.bottom > whole.bottom + .5)
      wrong.push([e.tagName, e.textContent, b.left, b.top, b.right, b.bottom]);
  }
  host.remove();
  return wrong;
}"""


@pytest.fixture(scope="module")
def doc() -> dict:
    doc = told(prompt(6, n_layers=6, n_features=80, n_links=10**6))
    outside = [n for n in ids_of(doc, FEATURE) if not n.endswith("_0")]
    groups = doc["jaxclt"]["story"]["groups"]
    for g, group in enumerate(groups):
        group["members"] = outside[g::9]
    groups[0]["name"] = "a name that is too long for one line of a card"
    doc["qParams"]["supernodes"] = [[g["name"], *g["members"]] for g in groups]
    doc["qParams"]["pinnedIds"] += ids_of(doc, "embedding")[1:5]
    return doc


def exported(tab, kind: str) -> tuple[str, Path]:
    with tab.expect_download() as download:
        tab.select_option("#export", kind)
    return download.value.suggested_filename, Path(download.value.path())


def parsed(file: Path) -> tuple[str, ElementTree.Element]:
    text = file.read_text(encoding="utf-8")
    return text, ElementTree.fromstring(text)


def tagged(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if e.tag.rpartition("}")[2] == tag]


@pytest.mark.parametrize("what", ["subgraph", "both"])
def test_the_subgraph_as_a_figure(open_page, doc, what):
    tab = open_page(page(doc), scheme="dark")
    name, file = exported(tab, f"{what}.svg")
    assert name == f"x-{what}.svg"
    text, root = parsed(file)
    assert LIGHT in text
    assert DARK not in text
    cards = tab.evaluate("__jaxclt.cards().map(c => c.label)")
    drawn = [e for e in root.iter() if e.get("class") == "card"]
    assert [tagged(e, "title")[0].text for e in drawn] == cards
    for label, card in zip(cards, drawn, strict=True):
        said = " ".join(e.text or "" for e in tagged(card, "text"))
        assert label in said
    arrows = [e for e in root.iter() if e.get("class") == "link"]
    assert len(arrows) == tab.locator(".lines > path").count() > 3
    heads = {e.get("id") for e in tagged(root, "marker")}
    for arrow in arrows:
        assert arrow.get("marker-end")[5:-1] in heads
    words = tab.locator(".lines > text").all_text_contents()
    assert set(words) <= {e.text for e in tagged(root, "text")}
    assert not {e.tag.rpartition("}")[2] for e in root.iter()} & {"image", "script"}
    assert re.fullmatch(r"0 0 \d+ \d+", root.get("viewBox"))
    if what == "subgraph":
        assert tab.evaluate(OUTSIDE, text) == []
        # Cards that the reader moved lie where they were put, and links bend to them.
        card = tab.locator(".card").first
        card.focus()
        for _ in range(12):
            tab.keyboard.press("Shift+ArrowLeft")
        text, _ = parsed(exported(tab, "subgraph.svg")[1])
        assert tab.evaluate(OUTSIDE, text) == []
    else:
        tokens = {e.text for e in tagged(root, "text")}
        assert {"L3", *(t.strip() for t in doc["metadata"]["prompt_tokens"])} & tokens


@pytest.mark.parametrize("what", ["graph", "both"])
def test_pixels_are_those_of_the_svg(open_page, doc, what):
    tab = open_page(page(doc))
    tab.evaluate("__jaxclt.app.showView('table')")
    _, root = parsed(exported(tab, f"{what}.svg")[1])
    data = exported(tab, f"{what}.png")[1].read_bytes()
    size = [int.from_bytes(data[i : i + 4], "big") for i in (16, 20)]
    assert size == [3 * int(root.get(side)) for side in ("width", "height")]
    assert len(data) > 10_000  # not blank


def test_hostile_labels_stay_text_in_figures(open_page):
    doc = graph_json(make_graph(tokens=HOSTILE, targets=HOSTILE), slug="x")
    doc = copy.deepcopy(doc)
    doc["qParams"]["supernodes"] = [[HOSTILE[0] + "\ud800", ids_of(doc, FEATURE)[0]]]
    doc["qParams"]["pinnedIds"] = ids_of(doc, "embedding")
    tab = open_page(page(doc))
    _, root = parsed(exported(tab, "subgraph.svg")[1])
    assert not {e.tag.rpartition("}")[2] for e in root.iter()} & {"img", "script"}
    assert exported(tab, "subgraph.png")[1].read_bytes().startswith(b"\x89PNG")


def test_an_empty_subgraph_is_said(open_page):
    tab = open_page(page(prompt(4)))
    tab.select_option("#export", "subgraph.svg")
    assert "The subgraph is empty" in tab.text_content("#notice")
