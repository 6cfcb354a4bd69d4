"""Saves of `jaxclt serve`: the version they are made from, two tabs, two servers."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from test_graph_json import make_graph
from test_serve import TOKEN, save, serving, talk, write

from jaxclt.errors import InputError
from jaxclt.files import guard
from jaxclt.serve.save import ChangedError, save_view, version_of
from jaxclt.trace.pages import read_graph
from jaxclt.viewer.graph_json import graph_json

DOC = graph_json(make_graph(), slug="cat")
FEATURES = [n for n in DOC["nodes"] if n["feature_type"] == "cross layer transcoder"]
IDS = [node["node_id"] for node in FEATURES]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "cat", DOC)
    return tmp_path


@contextmanager
def serve_process(root: Path) -> Iterator[int]:
    """`jaxclt serve` in a process of its own, ended by Ctrl+C."""
    command = [sys.executable, "-m", "jaxclt", "serve", root, "--port", "0", "--json"]
    process = subprocess.Popen(
        [*map(str, command), "--token", TOKEN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout
    url = json.loads(process.stdout.readline())["url"]
    assert url.endswith(f"/?token={TOKEN}")
    try:
        yield int(url.split(":")[2].split("/")[0])
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said


def test_a_save_of_an_older_version_is_refused_with_what_is_there(root: Path):
    file = root / "cat" / "graph.json"
    with serving(root) as server:
        ask = talk(server.port)
        assert f'"version":"{version_of(file)}"' in ask("/view/cat")[2]
        old = version_of(file)
        first = {"labels": {IDS[0]: "first"}, "qParams": {"pinnedIds": IDS[:1]}}
        status, _, text = save(ask, "/api/save/cat", first, If_Match=f'"{old}"')
        assert status == 200
        assert json.loads(text)["version"] == version_of(file) != old
        second = {"labels": {IDS[1]: "second"}, "qParams": {"pinnedIds": IDS[1:2]}}
        status, _, text = save(ask, "/api/save/cat", second, If_Match=f'"{old}"')
        now = json.loads(text)
        assert status == 409
        assert now["version"] == version_of(file)
        assert {k: v for k, v in now["labels"].items() if v} == {IDS[0]: "first"}
        assert now["qParams"]["pinnedIds"] == IDS[:1]
        again = f'"{now["version"]}"'
        assert save(ask, "/api/save/cat", second, If_Match=again)[0] == 200
        # Who names no version takes what is there.
        assert save(ask, "/api/save/cat", first)[0] == 200
        assert save(ask, "/api/save/cat", first, If_Match="*")[0] == 200


def test_in_python_too(root: Path):
    file = root / "cat" / "graph.json"
    old = version_of(file)
    new = save_view(file, {"labels": {IDS[0]: "x"}}, version=old)
    with pytest.raises(ChangedError) as changed:
        save_view(file, {"labels": {IDS[0]: "y"}}, version=old)
    assert changed.value.version == new == version_of(file)
    for key in ("pinnedIds", "supernodes", "cards", "sg_pos", "clickedId", "linkType"):
        for wrong in (5, True, {}, [[5]], 1e999, "\ud800", [None]):
            with pytest.raises(InputError) as refused:
                save_view(file, {"qParams": {key: wrong}})
            assert len(str(refused.value)) < 300
    assert version_of(file) == new
    # Half a character that another tool wrote does not keep a reader from saving.
    doc = read_graph(file)
    doc["metadata"]["prompt"] = "half \ud83d"
    file.write_text(json.dumps(doc))
    save_view(file, {"labels": {IDS[0]: "z"}})
    assert read_graph(file)["metadata"]["prompt"] == "half \ufffd"


def test_an_error_with_the_id_of_a_feature_keeps_its_label(root: Path):
    """As in files of circuit-tracer up to 0.5.0; these can be saved."""
    file = root / "cat" / "graph.json"
    doc = read_graph(file)
    error = next(n for n in doc["nodes"] if n["feature_type"].endswith("error"))
    error["node_id"] = IDS[0]
    doc["links"] = [
        x for x in doc["links"] if x["source"] in IDS and x["target"] in IDS
    ]
    file.write_text(json.dumps(doc))
    save_view(file, {"labels": {IDS[0]: "mine"}, "qParams": {"pinnedIds": IDS[:1]}})
    saved = {n["jsNodeId"]: n["clerp"] for n in read_graph(file)["nodes"]}
    assert saved[FEATURES[0]["jsNodeId"]] == "mine"
    assert saved[error["jsNodeId"]] == ""


def test_a_lock_that_is_held_for_long_is_told(root: Path):
    file = root / "cat" / "graph.json"
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2)"
    hold = f"{lock}; print(flush=True); sys.stdin.read()"
    name = file.parent / ".jaxclt-save.lock"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(name)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout
        other.stdout.readline()
        with (
            pytest.raises(InputError, match="another process is writing"),
            guard.locked(file, wait=0.1),
        ):
            pass
        other.communicate(b"")
    save_view(file, {"labels": {IDS[0]: "x"}})


class Reader:
    """A page without a browser: its own pins and label, merged as the page does."""

    def __init__(self, ports: list[int], own: list[str], seed: int) -> None:
        self.talks = [talk(port) for port in ports]
        self.own, self.random = own, random.Random(seed)
        self.version, self.pins, self.tried = "", [], 0

    def save_all(self) -> int:
        """One pin after the other; returns how many got no answer that can be."""
        failed = 0
        for node in self.own:
            self.pins.append(node)
            while True:
                self.tried += 1
                change = {"labels": {node: node}, "qParams": {"pinnedIds": self.pins}}
                ask = self.random.choice(self.talks)
                try:
                    status, _, text = save(
                        ask, "/api/save/cat", change, If_Match=f'"{self.version}"'
                    )
                except (OSError, http.client.HTTPException):
                    failed += 1
                    continue
                said = json.loads(text)
                if status == 409:
                    others = said["qParams"]["pinnedIds"]
                    self.pins = [*others, *(x for x in self.pins if x not in others)]
                elif status != 200:
                    failed += 1
                    break
                self.version = said["version"]
                if status == 200:
                    break
        return failed


def race(root: Path, ports: list[int], readers: int, each: int) -> tuple[int, int]:
    """(tried, failed) saves of readers that each pin nodes of their own."""
    made = [
        Reader(ports, IDS[i * each : (i + 1) * each], seed=i) for i in range(readers)
    ]
    with ThreadPoolExecutor(readers) as pool:
        failed = sum(pool.map(Reader.save_all, made))
    doc = read_graph(root / "cat" / "graph.json")
    own = {node for reader in made for node in reader.own}
    assert len(own) == readers * each
    labels = {n["node_id"] for n in doc["nodes"] if n["clerp"] == n["node_id"]}
    lost = len(own - set(doc["qParams"]["pinnedIds"])) + len(own - labels)
    return sum(reader.tried for reader in made), failed + lost


def test_no_save_is_lost_between_threads_and_two_servers(root: Path):
    with serving(root) as server, serve_process(root) as port:
        tried, failed = race(root, [server.port, port], readers=4, each=5)
    assert tried >= 20
    assert failed == 0


@pytest.mark.slow
def test_no_save_is_lost_between_three_processes(root: Path):
    tried = failed = 0
    with ExitStack() as stack:
        ports = [stack.enter_context(serve_process(root)) for _ in range(3)]
        for _ in range(10):
            write(root / "cat", DOC)
            counts = race(root, ports, readers=8, each=5)
            tried, failed = tried + counts[0], failed + counts[1]
    assert tried >= 400
    assert failed == 0, f"{failed} of {tried}"


DO = """([way, ...ids]) => {
  const {app} = __jaxclt, node = (id) => app.model.byId.get(id);
  if (way === "pin") ids.forEach((id) => app.togglePin(node(id)));
  if (way === "label") app.setLabel(node(ids[0]), ids[1]);
  if (way === "rename") app.rename(app.groups[0], ids[0]);
  if (way === "group") {
    app.setPins(app.pinned, [...app.groups, {label: ids[0], ids: ids.slice(1)}]);
    app.changed("pins");
  }
}"""
MERGED = "Saved, with what was saved elsewhere"


@pytest.fixture
def tabs(browser, root: Path):
    """Two tabs of a browser with the graph; a 409 is an error in their consoles."""
    wrong: list[str] = []
    with serving(root) as server, browser.new_context() as context:
        made = [context.new_page() for _ in range(2)]
        for tab in made:
            tab.set_default_timeout(10_000)
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.goto(f"http://127.0.0.1:{server.port}/view/cat?token={TOKEN}")
        yield made
    assert wrong == []


def saved(tab, root: Path, says: str) -> dict:
    tab.bring_to_front()
    tab.click("#save")
    tab.wait_for_selector(f"#notice:text-is('{says}')")
    tab.click("#notice")
    return read_graph(root / "cat" / "graph.json")


def groups_of(doc: dict) -> dict[str, list[str]]:
    return {name: ids for name, *ids in doc["qParams"]["supernodes"]}


def labels_of(doc: dict) -> list[str]:
    labels = {node["node_id"]: node["clerp"] for node in doc["nodes"]}
    return [labels[i] for i in IDS[5:9]]


@pytest.fixture
def begun(root: Path) -> None:
    """What the file holds before a tab opens it."""
    view = {"pinnedIds": IDS[:3], "supernodes": [["old", *IDS[1:3]]]}
    save_view(root / "cat" / "graph.json", {"labels": {IDS[5]: "old"}, "qParams": view})
    doc = read_graph(root / "cat" / "graph.json")
    doc["qParams"]["pinnedIds"].append("9_9_9")  # of an earlier pruning
    write(root / "cat", doc)


def test_two_tabs_keep_what_both_made(begun, tabs, root: Path):
    one, two = tabs
    for action in (
        ["pin", IDS[6]],
        ["pin", IDS[0]],  # was pinned
        ["label", IDS[6], "one"],
        ["label", IDS[5], "new"],
        ["group", "group of one", IDS[6], IDS[7]],
    ):
        one.evaluate(DO, action)
    saved(one, root, "Saved")
    for action in (
        ["pin", IDS[8]],
        ["label", IDS[8], "two"],
        ["rename", "renamed"],
    ):
        two.evaluate(DO, action)
    doc = saved(two, root, MERGED)
    assert set(doc["qParams"]["pinnedIds"]) == {*IDS[1:3], *IDS[6:9]}
    assert groups_of(doc) == {"renamed": IDS[1:3], "group of one": IDS[6:8]}
    assert labels_of(doc) == ["new", "one", "", "two"]
    assert (
        two.evaluate(
            "id => __jaxclt.app.model.label(__jaxclt.app.model.byId.get(id))", IDS[6]
        )
        == "one"
    )
    # The first tab, still of the older version, takes that in and goes on.
    one.evaluate(DO, ["label", IDS[8], "one again"])
    one.evaluate(DO, ["pin", IDS[7]])
    doc = saved(one, root, MERGED)
    assert set(doc["qParams"]["pinnedIds"]) == {*IDS[1:3], IDS[6], IDS[8]}
    assert groups_of(doc) == {"renamed": IDS[1:3], "group of one": IDS[6:7]}
    assert labels_of(doc) == ["new", "one", "", "one again"]
    assert saved(one, root, "Saved") == doc


def test_a_page_of_a_graph_that_was_traced_again_says_so(tabs, root: Path):
    file = root / "cat" / "graph.json"
    other = read_graph(file)
    for node in other["nodes"]:
        node["node_id"] += "9"
    for link in other["links"]:
        link["source"] += "9"
        link["target"] += "9"
    other["qParams"]["pinnedIds"] = [other["nodes"][0]["node_id"]]
    file.write_text(json.dumps(other))
    before = file.read_bytes()
    tabs[0].click("#save")
    tabs[0].wait_for_selector("#notice.bad:has-text('load the page again')")
    assert file.read_bytes() == before


def test_patches_of_several_processes_are_all_kept(root: Path):
    """The same read, change and replace, of patches.json."""
    from jaxclt.patching.log import keep_patch

    meta = make_graph().meta
    records = [{"name": str(i), "nodes": [str(i)], "mode": "x"} for i in range(24)]
    threads = [
        threading.Thread(target=keep_patch, args=(root / "cat", record, meta))
        for record in records
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = json.loads((root / "cat" / "patches.json").read_text())["patches"]
    assert {p["name"] for p in kept} == {p["name"] for p in records}
