"""A tour of the page on a graph that was really traced: JAXCLT_TRACED=DIR pytest ..."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxclt.pages import directory_page, read_graph
from jaxclt.viewer.graph_json import validate

TRACED = os.environ.get("JAXCLT_TRACED")
pytestmark = pytest.mark.skipif(TRACED is None, reason="JAXCLT_TRACED names no trace")


@pytest.mark.parametrize("size", [(1280, 800), (1920, 1080)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tour(open_page, size, scheme, tmp_path: Path):
    folder = Path(str(TRACED))
    doc = read_graph(folder / "graph.json")
    tab = open_page(
        directory_page(folder, doc=doc, compare=doc), size=size, scheme=scheme
    )
    total = f"{len(doc['nodes']):,}"
    assert tab.text_content("#count").startswith(f"{total} of {total} nodes")
    tab.fill("#slider", "0.3")
    tab.uncheck("#errors")
    assert tab.text_content("#count").split()[0] != total
    tab.check("#errors")
    tab.fill("#search", doc["metadata"]["prompt_tokens"][-1].strip())
    assert "match" in tab.text_content("#found")
    tab.keyboard.press("Enter")
    # The output, its strongest input, the strongest paths, their nodes as a circuit.
    tab.evaluate("__jaxclt.select(__jaxclt.app.model.logits[0].id)")
    assert "Probability" in tab.text_content("#sidebody")
    tab.click("details.paths summary")
    tab.locator("button.path").first.click()
    tab.click("text=Pin path")
    cards = tab.locator(".card")
    assert cards.count() >= 2
    for i in range(2):
        cards.nth(i).click(modifiers=["Shift"])
    tab.click("#group")
    assert "supernode of 2 nodes" in tab.text_content("#sidebody")
    tab.locator("ul[aria-label=Members] button").first.click()
    tab.click(".actions >> text=Clear")
    tab.click("#tab-evidence")
    assert "Replacement" in tab.text_content("#sidebody")
    tab.click("#view-compare")
    assert f"Shared ({total})" in tab.text_content("#comparetabs")
    tab.click("#view-table")
    assert tab.locator("#rows tr").count() > 10
    tab.click("#view-graph")
    for button in ("#zoomin", "#zoomout", "#zoomfit"):
        tab.click(button)
    validate(tab.evaluate("__jaxclt.document()"))
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("document.documentElement.scrollHeight <= innerHeight")
    # No control lies over another.
    boxes = tab.evaluate(
        "[...document.querySelectorAll('button, input, select')].map(e => "
        "e.getBoundingClientRect()).filter(r => r.width && r.height && r.top < "
        "innerHeight).map(r => [r.left, r.top, r.right, r.bottom])"
    )
    clash = [
        (a, b)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if min(a[2], b[2]) - max(a[0], b[0]) > 2
        and min(a[3], b[3]) - max(a[1], b[1]) > 2
    ]
    assert clash == []
    tab.screenshot(path=tmp_path / f"{size[0]}_{scheme}.png")
