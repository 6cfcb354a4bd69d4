"""The page of the global circuit: data escaped, nothing loaded, it works."""

from __future__ import annotations

import json

from jaxclt.viewer.globals_page import globals_page

HOSTILE = "</script><img src=x onerror=alert(1)>"
DOC = {
    "about": f"model {HOSTILE}",
    "k": 2,
    "texts": {"7": HOSTILE, "8": " Paris"},
    "features": [
        [0, 3, 0.25, 1.5, [[8, 2.0], [7, 1.0]], [[7, 0.5]], [[8, -3.0]]],
        [1, 9, 0.5, 0.1, [[7, 1.0]], [], []],
        [2, 4, float("nan"), 0.2, [], [], []],
    ],
    "links": [
        [0, 1, 0.5, 0.25, 0.125, 0.1],
        [1, 2, -2.0, -1e-7, -0.5, 0.2],
        [0, 2, 3.0, 0.0, 0.0, 0.0],
    ],
}


def test_data_is_escaped_and_comes_back_whole():
    html = globals_page(DOC)
    assert HOSTILE not in html
    assert html.count("</script>") == 2
    block = html.split('type="application/json">', 1)[1].split("</script>", 1)[0]
    data = json.loads(block)
    assert data["texts"] == DOC["texts"]
    assert data["features"][2][2] is None
    assert "http" not in html.replace("http-equiv", "")


def test_it_walks_from_feature_to_feature(open_page):
    doc = DOC | {"features": [*DOC["features"][:2], [2, 4, 0.1, 0.2, [], [], []]]}
    page = open_page(globals_page(doc))
    assert "Feature 9 of layer 1" in page.inner_text("#title")
    page.click("#inputs button")
    assert "Feature 3 of layer 0" in page.inner_text("#title")
    assert "Paris" in page.inner_text("#tokens_in")
    # Ranked by TWERA a link of zero is none; by virtual weight it leads.
    assert "2:4" not in page.inner_text("#outputs")
    page.select_option("#by", "2")
    assert page.locator("#outputs td").first.inner_text() == "2:4"
    page.fill("#name", "5:5")
    page.click("#pick button")
    assert "No such feature" in page.inner_text("#stats")
