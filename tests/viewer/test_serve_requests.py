"""Odd requests to `jaxclt serve`: each gets an answer, none a file that is no graph.

A failure is no answer, an answer of 500 or more, a line in the log, text of a file that
is not handed out, anything but a refusal without the token, or a graph that was broken.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from test_graph_json import HOSTILE, make_graph
from test_serve import TOKEN, serving, write

from jaxclt.serve.patch import read_change
from jaxclt.trace.pages import read_graph
from jaxclt.viewer.graph_json import graph_json

SECRET = "text of another file"
DOC = graph_json(make_graph(), slug="cat")
IDS = [node["node_id"] for node in DOC["nodes"]]
SAVE = {
    "labels": {IDS[0]: "a label"},
    "qParams": {
        "pinnedIds": IDS[:2],
        "supernodes": [["both", *IDS[:2]]],
        "linkType": "both",
        "clickedId": IDS[0],
        "sg_pos": "0 0",
        "cards": [[IDS[0], 1, 2.5]],
    },
}
PATCH = {"nodes": ["0_1_2"], "scale": 0, "mode": "additive", "name": "x"}
NAMES = (
    *("cat", "deep/a b#?", "foreign.json", "cat/graph.json", "nothing", ""),
    *("cut", "list", "bytes\udcff", "secret.json", ".hidden/secret.json", ".hidden"),
    *(
        "up",
        "up/outside.json",
        "link.json",
        "../outside.json",
        "cat/../../outside.json",
    ),
    *("cat/report.json", "cat/features/5.json", "..", ".", "/", "//etc/passwd", "~"),
    *("..\\outside.json", "a" * 300, "a/" * 900, "x" * 6000, "cat\0", "cat\n", "%00"),
)
PREFIXES = (
    *("/view/", "/api/graph/", "/api/feature/", "/api/save/", "/api/patch/"),
    *("/api/", "/", "//", "/api/graphs", "/view", "/static/", "http://evil.example/"),
)
METHODS = "GET HEAD POST PUT DELETE OPTIONS PATCH TRACE CONNECT get BREW"
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 5, 1e308, 10**400, float("nan"), "", "x", "\ud800", "\0"),
    *("x" * 5000, [], {}, [[]], [{}], [None], {"a": {"b": []}}, ["x"], [["a", "b"]]),
    *(IDS[:1], [IDS[:1]], [["x", *IDS]], [[IDS[0], 1e999, 0]], [[IDS[0], True, 0]]),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    write(root / "cat", DOC)
    hostile = make_graph(tokens=HOSTILE, targets=HOSTILE)
    write(root / "deep" / "a b#?", graph_json(hostile, slug="hostile"))
    (root / "foreign.json").write_text(json.dumps(DOC, sort_keys=True))
    (root / "cat" / "report.json").write_text(json.dumps({"note": SECRET}))
    (root / "cat" / "graph.npz").write_text(SECRET)
    (root / "cat" / "features").mkdir()
    (root / "cat" / "features" / "5.json").write_text('{"index": 5}')
    for name, text in {"cut": json.dumps(DOC)[:-5], "list": '{"metadata": []}'}.items():
        (root / name).mkdir()
        (root / name / "graph.json").write_text(text)
    odd = Path(os.fsdecode(os.fsencode(root) + b"/bytes\xff"))
    write(odd, DOC)
    (root / ".hidden").mkdir()
    hidden = {**DOC, "metadata": {**DOC["metadata"], "prompt": SECRET}}
    for path in (root / ".hidden" / "secret.json", tmp_path / "outside.json"):
        path.write_text(json.dumps(hidden))
    (root / "secret.json").write_text(json.dumps({"password": SECRET}))
    (root / "link.json").symlink_to(tmp_path / "outside.json")
    (root / "up").symlink_to(tmp_path)
    return root


class Reads:
    """Stands for the model: reads what is to be patched."""

    def patch(self, directory: Path, change: Any) -> dict[str, Any]:
        return {"nodes": read_change(change)[0]}


def path_of(rng: random.Random) -> bytes:
    good = rng.random() < 0.5
    name = os.fsencode(rng.choice(NAMES[:3] if good else NAMES))
    if rng.random() < 0.2:
        cut = rng.randrange(len(name) + 1)
        name = name[:cut] + rng.randbytes(rng.randrange(4)) + name[cut:]
    how = rng.random()
    if how < 0.6:
        said = quote(name)
    elif how < 0.8:
        said = "".join(f"%{byte:02x}" for byte in name)
    elif how < 0.9:
        said = quote(quote(name))
    else:
        return rng.choice(PREFIXES).encode() + name.replace(b" ", b"")
    tail = rng.choice(
        ["", "", "", "/5.json", "/" + "9" * rng.choice([1, 30, 3000]) + ".json"]
    )
    query = rng.choice(["", "", "", "?", "?token=x", "?a=%ff&=", f"?token={TOKEN}"])
    prefix = rng.choice([*PREFIXES[:5], "/api/save/"] if good else PREFIXES)
    return f"{prefix}{said}{tail}{query}".encode()


def changed(rng: random.Random, value: Any) -> Any:
    """A value with one wrong thing at some depth."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.25:
        return rng.choice(VALUES)
    at = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[at] = changed(rng, value[at])
    if isinstance(copy, dict) and rng.random() < 0.2:
        copy[rng.choice(["", "x", "\ud800", IDS[-1]])] = rng.choice(VALUES)
    return copy


def body_of(rng: random.Random) -> bytes:
    how = rng.random()
    if how < 0.7:
        return json.dumps(changed(rng, rng.choice([SAVE, PATCH]))).encode()
    if how < 0.8:
        return json.dumps(rng.choice([SAVE, PATCH])).encode()[: rng.randrange(400)]
    if how < 0.9:
        depth = rng.choice([10, 500, 100_000])
        return b'{"qParams": {"pinnedIds": ' + b"[" * depth + b"]" * depth + b"}}"
    return rng.choice([b"", b"\xff\xfe{", b"\0" * 99, b'"' + b"x" * (1 << 20) + b'"'])


def headers_of(rng: random.Random, here: str, length: int) -> dict[str, str]:
    headers = {
        "Host": here,
        "Origin": f"http://{here}",
        "Authorization": f"Bearer {TOKEN}",
        "Content-Type": "application/json",
        "Content-Length": str(length),
        "Connection": "close",
    }
    odd = {
        "Host": ["evil.example", "", "[", "127.0.0.1:99999999", "localhost", "a b"],
        "Origin": ["null", "http://evil.example", ""],
        "Authorization": ["", "Bearer", "Bearer x", "Basic eDp4", "token é"],
        "Content-Type": ["text/plain", "", "application/json; charset=utf-16"],
        "Content-Length": ["-1", "x", "", "9" * 30, "0x10", "1, 2"],
        "Transfer-Encoding": ["chunked", "gzip", "identity"],
        "Cookie": ["jaxclt", f"jaxclt-{here.split(':')[1]}=x", ";;=;", "x" * 9000],
        "If-Match": ["*", '"x"', "", "W/é", "x" * 9000],
        "Expect": ["100-continue", "nothing"],
        "Upgrade": ["websocket"],
        "Accept": ["text/html", "*/*;q=x"],
        "X": ["x" * 70_000],
    }
    while rng.random() < 0.4:
        name = rng.choice(list(odd))
        headers[name] = rng.choice(odd[name])
    return headers


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Status (0 for no answer) and everything that came back."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        try:
            peer.sendall(request)
            # What waits for more of a body is told that there is none.
            peer.settimeout(0.5)
            while more := peer.recv(1 << 20):
                got += more
        except (TimeoutError, ConnectionError):
            pass
    while got.startswith(b"HTTP/1.1 100"):
        got = got.partition(b"\r\n\r\n")[2]
    line = got.split(b"\r\n", 1)[0].split()
    known = len(line) > 1 and line[0] == b"HTTP/1.1" and line[1].isdigit()
    return int(line[1]) if known else 0, got


def wrong_with(port: int, rng: random.Random) -> tuple[int, str]:
    """The status of a request, and what is wrong with its answer, if anything."""
    body = body_of(rng)
    here = f"127.0.0.1:{port}"
    headers = headers_of(rng, here, len(body))
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    path = path_of(rng)
    usual = "POST" if b"/save/" in path or b"/patch/" in path else "GET"
    method = usual if rng.random() < 0.8 else rng.choice(METHODS.split())
    head = b"%s %s HTTP/1.1\r\n" % (method.encode(), path)
    head += "\r\n".join(lines).encode() + b"\r\n\r\n"
    status, got = exchange(port, head + body)
    about = f"{status} for {head[:300]!r} {body[:200]!r}"
    if status == 0:
        return status, f"no answer: {about}"
    if status >= 500:
        return status, f"failed: {about} {got[-300:]!r}"
    if SECRET.encode() in got or b"root:x" in got:
        return status, f"leaked: {about}"
    known = headers["Authorization"] == f"Bearer {TOKEN}"
    if status == 200 and not (known and headers["Host"] in (here, "localhost")):
        return status, f"let in: {about}"
    return status, ""


def tried(root: Path, seed: int, many: int) -> tuple[Counter[int], list[str]]:
    """How often each status came, and all that went wrong."""
    rng, found, statuses = random.Random(seed), [], Counter()
    log = logging.Handler()
    log.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("jaxclt.serve")
    logger.addHandler(log)
    with serving(root, Reads()) as server:
        for _ in range(many):
            status, wrong = wrong_with(server.port, rng)
            statuses[status] += 1
            if wrong:
                found.append(wrong)
        end = exchange(
            server.port,
            f"GET /api/graphs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Authorization: Bearer {TOKEN}\r\n\r\n".encode(),
        )
        if end[0] != 200:
            found.append(f"not there at the end: {end}")
    logger.removeHandler(log)
    for name in ("cat/graph.json", "deep/a b#?/graph.json", "foreign.json"):
        doc = read_graph(root / name)
        if doc["links"] != json.loads((root / name).read_text())["links"]:
            found.append(f"{name} has other links")
    if (root / "secret.json").read_text() != json.dumps({"password": SECRET}):
        found.append("a file that is no graph was written")
    return statuses, found


def test_odd_requests_get_an_answer(root: Path):
    statuses, found = tried(root, seed=1, many=300)
    assert found == []
    assert {200, 401, 403, 404, 422} <= statuses.keys()


@pytest.mark.slow
def test_many_odd_requests_get_an_answer(root: Path):
    statuses, found = tried(root, seed=2, many=2000)
    assert found == [], f"{len(found)} of {statuses.total()}: {statuses}"
