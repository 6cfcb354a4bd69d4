"""Who `jaxclt serve` lets in: tokens, names of the host, what a client may hold."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from pathlib import Path

import pytest
from test_graph_json import make_graph
from test_serve import TOKEN, save, serving, talk, write

from jaxclt.errors import InputError
from jaxclt.serve import app, listen
from jaxclt.serve.listen import make_server
from jaxclt.viewer.graph_json import graph_json

LARGE = 12 << 20  # more than the system takes off a server's hands
NONE = {"Authorization": ""}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "cat", graph_json(make_graph(), slug="cat"))
    return tmp_path


def test_without_the_token_nothing_is_told(root: Path):
    with serving(root) as server:
        ask = talk(server.port)
        for given in ({}, {"Authorization": "Bearer x"}, {"Cookie": f"jaxclt={TOKEN}"}):
            for path in ("/", "/view/cat", "/api/graphs", "/api/graph/cat", "/nothing"):
                status, headers, text = ask(path, **NONE | given)
                assert status == 401
                assert headers["WWW-Authenticate"] == "Bearer"
                assert "jaxclt serve printed" in json.loads(text)["error"]
            assert save(ask, "/api/save/cat", {}, **NONE | given)[0] == 401
        assert ask("/?token=wrong", **NONE)[0] == 401
        assert ask("/?token=", **NONE)[0] == 401
        assert ask(f"/api/save/cat?token={TOKEN}", method="POST", **NONE)[0] == 401
        for path, link in (
            ("/view/c%22%3Ct", "/view/c%22%3Ct"),
            ("//a'b", "/a&#x27;b"),
        ):
            page = ask(path, Accept="text/html", **NONE)[2]
            assert f'<a href="{link}">try again</a>' in page


def test_the_printed_address_leaves_a_cookie(root: Path):
    with serving(root) as server:
        ask = talk(server.port)
        assert server.url == f"http://127.0.0.1:{server.port}/?token={TOKEN}"
        for path, clean in (
            (f"/?token={TOKEN}", "/"),
            (f"/view/a%20b?x=1&token={TOKEN}", "/view/a%20b?x=1"),
            (f"//evil.example/?token={TOKEN}", "/evil.example/"),
        ):
            status, headers, _ = ask(path, **NONE)
            assert (status, headers["Location"]) == (303, clean)
        kept, *rules = headers["Set-Cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(rules)
        assert kept == f"jaxclt-{server.port}={TOKEN}"
        assert ask("/", **NONE, Cookie=f"other=1; {kept}")[0] == 200
        assert save(ask, "/api/save/cat", {}, **NONE, Cookie=kept)[0] == 200
        assert ask("/?token=old", **NONE, Cookie=kept)[0] == 200
        assert ask("/", Authorization=f"token {TOKEN}")[0] == 200


def test_a_token_is_made_or_given(root: Path):
    made = [make_server(root) for _ in range(2)]
    assert len({server.token for server in made}) == 2
    assert all(len(server.token) >= 32 for server in made)
    for server in made:
        server.close()
    for bad in ("", "a b", "ä", "a;b", "x" * 300):
        with pytest.raises(InputError, match="--token"):
            make_server(root, token=bad)


def test_only_names_of_this_machine_are_answered(root: Path):
    """With --host 0.0.0.0 too, where a foreign name may be pointed at any address."""
    for host in ("127.0.0.1", "0.0.0.0"):
        with serving(root, host=host, allow_host=["gpu.example"]) as server:
            ask = talk(server.port)
            assert server.url.startswith("http://127.0.0.1:")
            for good in ("localhost", "127.0.0.1", "[::1]:80", "GPU.example:8032"):
                assert ask("/", Host=good)[0] == 200
            for bad in ("evil.example", "gpu.example.evil.example", "0.0.0.0", "[::2]"):
                status, _, text = ask("/", Host=bad)
                assert status == 403
                assert "--allow-host" in json.loads(text)["error"]
                evil = {"Host": bad, "Origin": f"http://{bad}"}
                assert save(ask, "/api/save/cat", {}, **evil)[0] == 403
    for bad in ("gpu.example:80", "", "*", "http://gpu.example"):
        with pytest.raises(InputError, match="--allow-host"):
            make_server(root, allow_host=[bad])


def test_the_address_that_was_connected_to_is_a_name(root: Path):
    """127.0.0.2 stands for a machine's address in its network."""
    with serving(root, host="0.0.0.0") as server:
        with socket.create_connection(("127.0.0.2", server.port), timeout=5) as peer:
            head = f"Host: 127.0.0.2:{server.port}\r\nAuthorization: Bearer {TOKEN}"
            peer.sendall(f"GET / HTTP/1.1\r\n{head}\r\n\r\n".encode())
            assert peer.recv(99).startswith(b"HTTP/1.1 200")
        assert talk(server.port)("/", Host="127.0.0.2")[0] == 403


def test_slow_and_idle_clients_are_left(root: Path, monkeypatch):
    monkeypatch.setattr(listen, "PATIENCE", 1.0)
    monkeypatch.setattr(app, "PATIENCE", 0.1)
    with serving(root) as server:
        head = f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        body = (
            f"POST /api/save/cat HTTP/1.1\r\n{head}Origin: http://127.0.0.1:"
            f"{server.port}\r\nContent-Type: application/json\r\n"
        )
        for sent, answer in (
            ("", b""),
            (f"GET / HTTP/1.1\r\n{head}", b""),
            (f"{body}Content-Length: 99\r\n\r\n{{", b"HTTP/1.1 408"),
        ):
            with socket.create_connection(("127.0.0.1", server.port)) as peer:
                peer.settimeout(5)
                peer.sendall(sent.encode())
                start = time.monotonic()
                got = b""
                try:
                    while more := peer.recv(1 << 16):
                        got += more
                except ConnectionResetError:
                    pass
                assert time.monotonic() - start < 5
                assert got[:12] == answer


def test_who_does_not_read_is_left_and_who_reads_slowly_is_not(root: Path, monkeypatch):
    monkeypatch.setattr(listen, "PATIENCE", 0.5)
    large = graph_json(make_graph(), slug="cat")
    large["metadata"]["prompt"] = "x" * LARGE
    write(root / "large", large)
    with serving(root) as server:
        head = f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        get = f"GET /api/graph/large HTTP/1.1\r\n{head}\r\n".encode()

        def read(wait: float) -> int:
            with socket.create_connection(
                ("127.0.0.1", server.port), timeout=5
            ) as peer:
                peer.sendall(get)
                got = len(peer.recv(1))
                time.sleep(wait)
                try:
                    while got < LARGE and (more := len(peer.recv(1 << 18))):
                        got += more
                        time.sleep(0.001)
                except ConnectionResetError:
                    pass
            return got

        assert read(0.1) >= LARGE
        assert read(1.5) < LARGE


def test_an_answer_that_takes_long_is_waited_for(root: Path, monkeypatch):
    monkeypatch.setattr(listen, "PATIENCE", 0.05)
    monkeypatch.setattr(
        app, "read_graph", lambda path: (time.sleep(0.3), path.read_text())
    )
    with serving(root) as server:
        assert talk(server.port)("/api/graph/cat")[0] == 200


def test_large_heads_and_many_connections_are_refused(root: Path, monkeypatch):
    monkeypatch.setattr(listen, "MAX_CONNECTIONS", 3)
    with serving(root) as server:
        ask = talk(server.port)
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (listen.MAX_HEADERS + 1))
            assert peer.recv(99).startswith(b"HTTP/1.1 400")
        assert ask("/" + "x" * 5000)[0] == 414
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        assert ask("/")[0] == 503
        for peer in idle:
            peer.close()
        end = time.monotonic() + 5
        while ask("/")[0] != 200:
            assert time.monotonic() < end


def test_what_was_not_foreseen_is_told_and_logged(root: Path, monkeypatch, caplog):
    monkeypatch.setattr(app, "read_graph", lambda path: 1 // 0)
    with serving(root) as server, caplog.at_level(logging.INFO, "jaxclt.serve"):
        ask = talk(server.port)
        status, headers, text = ask("/api/graph/cat")
        assert status == 500
        assert "ZeroDivisionError" in json.loads(text)["error"]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        (record,) = caplog.records
        assert record.getMessage().startswith("GET /api/graph/cat failed: ZeroDiv")
        assert record.exc_info is None
        assert ask("/")[0] == 200


def test_a_patch_that_runs_does_not_hold_the_server(root: Path):
    """Neither other requests, nor its end."""
    started, go_on = threading.Event(), threading.Event()

    class Slow:
        def patch(self, directory: Path, change: object) -> dict:
            started.set()
            go_on.wait(10)
            return {}

    for name in ("graph.npz", "report.json"):
        (root / "cat" / name).write_text("{}")
    with serving(root, Slow()) as server:
        ask = talk(server.port)
        patching = threading.Thread(target=save, args=(ask, "/api/patch/cat", {}))
        patching.start()
        assert started.wait(5)
        assert ask("/")[0] == 200
        start = time.monotonic()
    assert time.monotonic() - start < 3
    go_on.set()
    patching.join()
