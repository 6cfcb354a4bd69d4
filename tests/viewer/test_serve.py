"""`jaxclt serve`: what it hands out, what it refuses, what it saves."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_graph_json import HOSTILE, make_graph

from jaxclt.dashboards import files
from jaxclt.errors import InputError
from jaxclt.serve.app import MAX_BODY
from jaxclt.serve.listen import Server, make_server
from jaxclt.serve.save import save_view
from jaxclt.trace.pages import directory_page, read_graph
from jaxclt.viewer.graph_json import graph_json

SECRET = "outside the folder"
TOKEN = "a-token_of.tests~"


def write(folder: Path, doc: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(doc), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    write(root / "cat", graph_json(make_graph(), slug="cat"))
    hostile = make_graph(tokens=HOSTILE, targets=HOSTILE)
    write(root / "deep" / "a b#?", graph_json(hostile, slug="hostile"))
    (root / "cat" / "report.json").write_text("{}")
    features = root / "cat" / "features"
    features.mkdir()
    (features / "5.json").write_text('{"index": 5, "examples_quantiles": []}')
    (tmp_path / "secret.json").write_text(json.dumps({"metadata": SECRET}))
    (tmp_path / "graph.json").write_text(json.dumps({"metadata": SECRET}))
    os.symlink(tmp_path / "secret.json", root / "link.json")
    os.symlink(tmp_path, root / "up")
    os.symlink(tmp_path / "secret.json", features / "7.json")
    return root


def packed(folder: Path, filename: str = "layer_1.bin") -> None:
    """Feature 3 of layer 1 (number 13), as `jaxclt features` writes it."""
    record = files.pack(b'{"index": 13, "examples_quantiles": []}')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layer_1.bin").write_bytes(record)
    files.write_index(folder, {1: [0, 0, 0, 0, len(record)]})
    if filename != "layer_1.bin":
        (folder / "layer_1.bin").rename(folder.parents[2] / filename)
        (folder / "layer_1.bin").symlink_to(folder.parents[2] / filename)


def test_packed_features_are_served(root: Path, ask):
    packed(root / "cat" / "features")
    number = files.cantor(1, 3)
    status, _, text = ask(f"/api/feature/cat/{number}.json")
    assert (status, json.loads(text)["index"]) == (200, number)
    assert ask("/api/feature/cat/5.json")[0] == 200  # loose ones too
    assert ask(f"/api/feature/cat/{files.cantor(1, 2)}.json")[0] == 404
    assert ask(f"/api/feature/cat/{files.cantor(2, 0)}.json")[0] == 404


def test_packed_features_that_lie_elsewhere_are_not(root: Path, ask):
    packed(root / "cat" / "features", "outside.bin")
    number = files.cantor(1, 3)
    assert ask(f"/api/feature/cat/{number}.json")[0] == 404
    (root / "cat" / "features" / "index.json.gz").unlink()
    packed(root.parent / "elsewhere")
    inside = root / "cat" / "features" / "index.json.gz"
    inside.symlink_to(root.parent / "elsewhere" / "index.json.gz")
    assert ask(f"/api/feature/cat/{number}.json")[0] == 404


@contextmanager
def serving(root: Path, patcher=None, **options) -> Iterator[Server]:
    server = make_server(root, patcher=patcher, token=TOKEN, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server
    server.stop()
    thread.join()


@pytest.fixture
def server(root: Path):
    with serving(root) as server:
        yield server


@pytest.fixture
def ask(server):
    return talk(server.port)


def talk(port: int):
    """A function that sends a request; returns status, headers and text."""
    here = f"127.0.0.1:{port}"

    def ask(path: str, *, method: str = "GET", body=None, **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        headers = {
            "Host": here,
            "Origin": f"http://{here}",
            "Authorization": f"Bearer {TOKEN}",
            **headers,
        }
        if body is not None:
            headers = {"Content_Length": str(len(body)), **headers}
        for name, value in headers.items():
            if value:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, text

    return ask


def save(ask, path: str, change: object, **headers: str):
    body = change if isinstance(change, bytes) else json.dumps(change).encode()
    headers = {"Content_Type": "application/json", **headers}
    return ask(path, method="POST", body=body, **headers)


def test_the_list_and_the_pages(ask):
    status, headers, text = ask("/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "The cat sat" in text
    assert "<img" not in text
    assert 'href="/view/deep/a%20b%23%3F"' in text
    graphs = json.loads(ask("/api/graphs")[2])
    assert [g["path"] for g in graphs] == ["cat", "deep/a b#?"]
    status, _, text = ask("/view/cat")
    assert status == 200
    assert "connect-src 'self'" in text
    assert json.loads(ask("/api/graph/cat")[2])["metadata"]["slug"] == "cat"
    assert json.loads(ask("/api/feature/cat/5.json")[2])["index"] == 5
    assert ask("/", method="HEAD")[2] == ""


@pytest.mark.parametrize(
    "path",
    [
        "/api/graph/../secret.json",
        "/api/graph/..%2fsecret.json",
        "/api/graph/%2e%2e/secret.json",
        "/api/graph/cat/../../secret.json",
        "/api/graph/..",
        "/api/graph/..%5csecret.json",
        "/api/graph//etc/passwd",
        "/api/graph/link.json",
        "/api/graph/up",
        "/api/graph/up/secret.json",
        "/api/graph/cat/graph.json%00.json",
        "/api/graph/nothing",
        "/api/feature/cat/7.json",
        "/api/feature/cat/..%2f..%2f5.json",
        "/api/feature/cat/6.json",
        "/view/../secret.json",
        "/view/up",
        "/secret.json",
        "/../secret.json",
        "/static/graph.html",
        "/api/graph/" + "a/" * 3000,
        "/api/graph/" + "a" * 300,
    ],
)
def test_nothing_outside_the_folder_is_served(ask, path):
    status, _, text = ask(path)
    assert 400 <= status < 500
    assert SECRET not in text
    assert "root:" not in text


def test_a_path_that_is_no_text_is_refused(ask):
    assert ask("/api/graph/%ff%fe")[0] == 400


def test_other_names_for_this_host_are_refused(ask):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        assert ask("/", Host=host)[0] == 403
    assert ask("/", Host="")[0] == 400  # as RFC 9112 wants


def test_what_is_saved_is_in_the_file_and_its_page(ask, root):
    file = root / "cat" / "graph.json"
    doc = read_graph(file)
    a, b = (n["node_id"] for n in doc["nodes"][:2])
    change = {
        "labels": {a: "<b>mine</b>"},
        "qParams": {
            "pinnedIds": [a, b],
            "supernodes": [["both", a, b]],
            "cards": [[f"+{a}", 12, -3.5]],
            "evil": 1,
        },
    }
    assert save(ask, "/api/save/cat", change)[0] == 200
    saved = read_graph(file)
    assert saved["nodes"][0]["clerp"] == "<b>mine</b>"
    assert saved["qParams"]["supernodes"] == [["both", a, b]]
    assert "evil" not in saved["qParams"]
    assert saved["qParams"]["cards"] == [[f"+{a}", 12, -3.5]]
    assert saved["links"] == doc["links"]
    assert not [f for f in file.parent.iterdir() if f.name.startswith(".graph")]
    assert "\\u003cb\\u003emine" in directory_page(file.parent)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b'{"labels": []}', 422),
        (b'{"labels": {"nothing": "x"}}', 422),
        (b'{"labels": {"0_-1_0": 5}}', 422),
        (b'{"labels": {"E_10_0": "' + b"x" * 3000 + b'"}}', 422),
        (b'{"labels": {"4_500_3": "an output"}}', 422),
        (b'{"qParams": {"pinnedIds": ["nothing"]}}', 422),
        (b'{"qParams": {"pinnedIds": [["E_10_0"]]}}', 422),
        (b'{"qParams": {"supernodes": [["empty"]]}}', 422),
        (b'{"qParams": {"supernodes": {"a": 1}}}', 422),
        (b'{"qParams": {"linkType": "all"}}', 422),
        (b'{"qParams": {"cards": [["E_10_0", 1]]}}', 422),
        (b'{"qParams": {"cards": [["E_10_0", 1, "2"]]}}', 422),
        (b'{"qParams": {"cards": [["E_10_0", 1, 1e999]]}}', 422),
        (b'{"qParams": {"cards": {"E_10_0": [1, 2]}}}', 422),
    ],
)
def test_what_does_not_fit_is_not_saved(ask, root, body, status):
    before = (root / "cat" / "graph.json").read_bytes()
    assert save(ask, "/api/save/cat", body)[0] == status
    assert (root / "cat" / "graph.json").read_bytes() == before


def test_oversized_unsized_and_foreign_requests_are_refused(ask, root):
    before = (root / "cat" / "graph.json").read_bytes()
    large = str(MAX_BODY + 1)
    refused = [
        ({"Content_Length": large}, 413),
        ({"Content_Length": "9" * 30}, 400),
        ({"Content_Length": "-1"}, 400),
        ({"Content_Length": ""}, 411),
        ({"Transfer_Encoding": "chunked"}, 411),
        ({"Content_Type": "text/plain"}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
    ]
    for headers, status in refused:
        assert save(ask, "/api/save/cat", {"labels": {}}, **headers)[0] == status
    for path in ("/api/save/../secret.json", "/api/save/up", "/api/save/link.json"):
        assert save(ask, path, {})[0] == 404
    assert save(ask, "/view/cat", {})[0] == 405
    assert ask("/", method="DELETE")[0] == 405
    assert (root / "cat" / "graph.json").read_bytes() == before


def test_a_failed_write_leaves_the_file(root, monkeypatch):
    file = root / "cat" / "graph.json"
    before = file.read_bytes()
    monkeypatch.setattr(
        os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(InputError):
        save_view(file, {"qParams": {"clickedId": "x"}})
    assert file.read_bytes() == before


def test_no_folder_and_a_taken_port_are_input_errors(tmp_path, server):
    with pytest.raises(InputError, match="not a folder"):
        make_server(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot listen"):
        make_server(tmp_path, port=server.port)
    with pytest.raises(InputError, match="cannot listen"):
        make_server(tmp_path, port=70_000)


def test_the_page_saves_and_compares_in_a_browser(open_url, server, root):
    origin = f"http://127.0.0.1:{server.port}"
    tab = open_url(server.url, origin)
    tab.click("text=The cat sat")
    tab.wait_for_selector("#save")
    tab.evaluate(
        "(({app}) => { app.togglePin(app.model.nodes[0]);"
        "app.setLabel(app.model.nodes.find(n => n.kind === 'feature'), 'a label'); })"
        "(__jaxclt)"
    )
    tab.click("#save")
    tab.wait_for_selector("#notice:has-text('Saved')")
    doc = read_graph(root / "cat" / "graph.json")
    assert len(doc["qParams"]["pinnedIds"]) == 1
    assert any(n["clerp"] == "a label" for n in doc["nodes"])
    tab.click("#view-compare")
    tab.select_option("#others", "deep/a b#?")
    tab.click("#comparetabs >> text=Only right")
    tab.wait_for_selector("#comparerows tr")
