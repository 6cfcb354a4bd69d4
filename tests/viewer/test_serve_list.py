"""The list of `jaxclt serve`: what it says of graphs, its pictures, two to compare."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_graph_json import HOSTILE, make_graph
from test_page import FEATURE, ids_of, violations
from test_serve import serving, talk, write

from jaxclt.serve import told
from jaxclt.serve.folder import Folder
from jaxclt.serve.save import save_view
from jaxclt.serve.told import picture_of, told_by
from jaxclt.viewer.graph_json import graph_json

DOC = graph_json(make_graph(), slug="cat")
SCORES = {"full": {"replacement": 0.62, "completeness": 0.84}}


def report(prompt: str, answer: str = " mat", **more) -> dict:
    return {
        "prompt": prompt,
        "model": "smol",
        "dictionary": "clt-64",
        "top_tokens": [[answer, 0.731], [" hat", 0.1]],
        "scores": SCORES,
        **more,
    }


def graph(folder: Path, prompt: str, **parts) -> Path:
    """A traced directory: a graph of another prompt, and its report."""
    doc = copy.copy(DOC)
    doc["metadata"] = {**DOC["metadata"], "prompt": prompt}
    write(folder, doc)
    (folder / "report.json").write_text(json.dumps(report(prompt, **parts)))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    graph(tmp_path / "a", "The cat sat")
    dog = graph(tmp_path / "deep" / "b #?", "A dog ran", answer=" away", model="large")
    save_view(dog / "graph.json", {"qParams": {"pinnedIds": ids_of(DOC, FEATURE)[:1]}})
    graph(tmp_path / "hostile", HOSTILE[0], answer=HOSTILE[0], model=HOSTILE[0])
    write(tmp_path / "plain", DOC)  # without a report
    return tmp_path


def test_the_list_says_what_the_report_says(root: Path):
    with serving(root) as server:
        ask = talk(server.port)
        found = {g["path"]: g for g in json.loads(ask("/api/graphs")[2])}
        text = ask("/")[2]
        assert ask("/", Authorization="", Cookie="")[0] == 401
        assert ask("/api/picture/a", Authorization="", Cookie="")[0] == 401
    assert list(found) == ["a", "deep/b #?", "hostile", "plain"]
    assert found["deep/b #?"] | {"changed": 0} == {
        "path": "deep/b #?",
        "slug": DOC["metadata"]["slug"],
        "prompt": "A dog ran",
        "model": "large",
        "dictionary": "clt-64",
        "answer": " away",
        "probability": 0.731,
        "replacement": 0.62,
        "completeness": 0.84,
        "changed": 0,
    }
    assert abs(found["a"]["changed"] - time.time()) < 600
    assert found["plain"].keys() == {"path", "slug", "prompt", "changed"}
    assert "<img" not in text
    for part in ("73 %", "62 %", "84 %", "smol", "clt-64"):
        assert part in text


@pytest.mark.parametrize(
    ("wrong", "left"),
    [
        ({"top_tokens": [[5, "x"]]}, {"answer", "probability"}),
        ({"top_tokens": [["a", float("nan")]]}, {"answer", "probability"}),
        ({"top_tokens": []}, {"answer", "probability"}),
        (
            {"scores": {"full": {"replacement": 7, "completeness": None}}},
            {"replacement", "completeness"},
        ),
        ({"scores": None, "model": 3}, {"replacement", "completeness", "model"}),
    ],
)
def test_what_is_no_report_is_left_out(tmp_path: Path, wrong: dict, left: set):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report("x", **wrong)))
    known = {"prompt", "model", "dictionary", "answer", "probability"}
    known |= {"replacement", "completeness"}
    assert told_by(file).keys() == known - left
    for text in ("[1]", "{", ""):
        file.write_text(text)
        assert told_by(file) == {}


def test_a_report_of_another_prompt_or_from_elsewhere_is_not_told(root: Path):
    (root / "a" / "report.json").write_text(json.dumps(report("another")))
    outside = root.parent / "secret.json"
    outside.write_text(json.dumps(report("A dog ran")))
    linked = root / "deep" / "b #?" / "report.json"
    linked.unlink()
    linked.symlink_to(outside)
    found = {g["path"]: g for g in Folder(root).graphs()}
    assert "model" not in found["a"]
    assert "model" not in found["deep/b #?"]


def test_a_picture_has_the_nodes_by_layer_and_position(tmp_path: Path):
    write(tmp_path / "a", DOC)
    root = ElementTree.fromstring(picture_of(tmp_path / "a" / "graph.json"))
    dots = [e.attrib for e in root.iter() if e.tag.endswith("circle")]
    cells = {tuple(n.split("_")[::2]) for n in ids_of(DOC, FEATURE)}
    assert sum(d["class"] == "r" for d in dots) == len(cells)
    tokens = DOC["metadata"]["prompt_tokens"]
    low = [d for d in dots if d["class"] == "s" and d["cy"] == "44.0"]
    assert len(low) == len(tokens)
    assert {d["cy"] for d in dots if d["class"] == "s"} == {"44.0", "4.0"}
    assert sorted({float(d["cx"]) for d in low})[0] == pytest.approx(
        132 / len(tokens) / 2, abs=0.1
    )
    # The same from a file in another order; nothing from what is no graph.
    other = tmp_path / "other.json"
    other.write_text(json.dumps(DOC, sort_keys=True))
    again = ElementTree.fromstring(picture_of(other))
    assert {tuple(sorted(e.attrib.items())) for e in again.iter()} == {
        tuple(sorted(e.attrib.items())) for e in root.iter()
    }
    odd = {"feature_type": FEATURE, "ctx_idx": 10**9, "layer": "0"}
    for text in ("", "{", "[]", "5", '{"nodes":[],"links":[]}', '{"nodes":5}',
                 json.dumps({"nodes": [odd, 3, {**odd, "ctx_idx": 0, "layer": [1]}]}),
                 ):  # fmt: skip
        other.write_text(text)
        assert picture_of(other) == ""


def test_a_thousand_graphs_are_listed_fast(tmp_path: Path, monkeypatch):
    read: list[Path] = []
    made = told.picture_of
    monkeypatch.setattr("jaxclt.serve.folder.picture_of",
                        lambda p: (read.append(p), made(p))[1])  # fmt: skip
    first = graph(tmp_path / "g0000", "The cat sat")
    for i in range(1, 1000):
        folder = tmp_path / f"g{i:04d}"
        folder.mkdir()
        for name in ("graph.json", "report.json"):
            os.link(first / name, folder / name)
    folder = Folder(tmp_path)
    start = time.process_time()
    assert len(folder.graphs()) == 1000
    cold = time.process_time() - start
    start = time.process_time()
    found = folder.graphs()
    warm = time.process_time() - start
    assert found[-1]["answer"] == " mat"
    assert read == []  # pictures are made when they are looked at
    folder.picture("g0500")
    folder.picture("g0500")
    assert len(read) == 1
    assert cold < 3
    assert warm < 1


def test_the_list_in_a_browser(open_url, root: Path):
    with serving(root) as server:
        tab = open_url(server.url, f"http://127.0.0.1:{server.port}")
        shown = "tbody tr:not([hidden])"
        assert tab.locator(shown).count() == 4
        tab.wait_for_selector(".picture svg circle")
        assert violations(tab) == []
        tab.fill("#search", "large AWAY")
        assert tab.text_content("#count") == "1 of 4 graphs"
        assert "A dog ran" in tab.locator(shown).text_content()
        tab.fill("#search", "")
        boxes = tab.locator("tbody input")
        assert not tab.is_visible("#compare")
        boxes.nth(1).check()
        boxes.nth(0).check()
        assert boxes.nth(2).is_disabled()
        tab.click("#compare")
        tab.wait_for_selector("#comparetabs button")
        assert tab.text_content("#heretitle") == "A dog ran"
        assert tab.text_content("#theretitle") == "The cat sat"
        assert tab.is_visible("#compared")
        assert tab.evaluate("__jaxclt.app.pinned.length") == 1  # those of the file


def test_a_second_graph_must_be_one_of_the_folder(root: Path):
    (root.parent / "out.json").write_text(json.dumps(DOC))
    with serving(root) as server:
        ask = talk(server.port)
        assert ask("/view/a?compare=plain")[0] == 200
        for name in ("nothing", "../out.json", "%2e%2e/out.json", ""):
            assert ask(f"/view/a?compare={name}")[0] == 404, name
        status, headers, _ = ask("/api/picture/a")
        assert (status, headers["content-type"]) == (200, "image/svg+xml")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert ask("/api/picture/nothing")[0] == 404
