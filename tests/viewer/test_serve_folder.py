"""The list of `jaxclt serve`: what it names, what it keeps, what is handed out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_graph_json import make_graph
from test_serve import serving, talk, write

from jaxclt.serve import folder as folders
from jaxclt.serve.folder import Folder, NotServedError
from jaxclt.viewer.graph_json import graph_json

DOC = graph_json(make_graph(), slug="cat")


def names(folder: Folder) -> list[str]:
    return [entry["path"] for entry in folder.graphs()]


def test_bad_folders_are_named_and_the_rest_is_listed(tmp_path: Path):
    write(tmp_path / "good", DOC)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    write(odd, DOC)
    write(tmp_path / "two\nlines", DOC)
    for name, text in {
        "list": '{"metadata": ["x"], "nodes": []}',
        "number": '{"nodes": [], "links": [], "metadata": 5}',
        "broken": "{nothing",
        "cut": json.dumps(DOC)[:-9],
        "deep": '{"metadata": ' + "[" * 100_000,
        "empty": "",
        "other": "[1, 2]",
        "bytes": "\udcff",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph.json").write_bytes(os.fsencode(text))
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "graph.json").symlink_to("graph.json")
    write(tmp_path / "wide\u3000space", DOC)
    half = {**DOC["metadata"], "prompt": "\ud800", "slug": ["x"]}
    write(tmp_path / "half", {**DOC, "metadata": half})
    found = {entry["path"]: entry for entry in Folder(tmp_path).graphs()}
    good = {path for path, entry in found.items() if "error" not in entry}
    assert good == {"good", "half", "wide\u3000space"}
    bad = {"list", "number", "broken", "cut", "deep", "empty", "other", "bytes", "loop"}
    assert found.keys() == good | bad | {"\\udcff\\udcfe", "two\nlines"}
    assert found["list"]["error"] == "its metadata is not an object"
    assert found["cut"]["error"] == "it is cut off"
    with serving(tmp_path) as server:
        ask = talk(server.port)
        status, _, text = ask("/")
        assert status == 200
        assert text.count("<a href=") == 3
        assert "its metadata is not an object" in text
        assert ask("/view/list")[0] == ask("/view/cut")[0] == 422
        assert len(json.loads(ask("/api/graphs")[2])) == len(found)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch):
    write(tmp_path / "good", DOC)
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def scandir(path: Path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    closed, good = Folder(tmp_path).graphs()
    assert closed == {"path": "closed", "error": "cannot be read: Permission denied"}
    assert good["slug"] == "cat"


def test_graphs_are_told_from_other_json_by_what_they_hold(tmp_path: Path):
    (tmp_path / "sorted.json").write_text(json.dumps(DOC, sort_keys=True))
    long = {**DOC["metadata"], "prompt": "x" * 100_000}
    (tmp_path / "long.json").write_text(json.dumps({**DOC, "metadata": long}))
    (tmp_path / "config.json").write_text('{"auths": {"hub": "secret"}}')
    (tmp_path / "broken.json").write_text("{")
    for hidden in (".docker", "seen/.hidden"):
        (tmp_path / hidden).mkdir(parents=True)
        (tmp_path / hidden / "config.json").write_text(json.dumps(DOC))
    (tmp_path / ".graph.json").write_text(json.dumps(DOC))
    (tmp_path / "link").symlink_to(tmp_path / ".docker")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = Folder(tmp_path)
    assert names(folder) == ["long.json", "sorted.json"]
    assert folder.graph("sorted.json") == tmp_path / "sorted.json"
    for name in (
        *("config.json", "broken.json", ".docker/config.json", ".graph.json", "loop"),
        *("seen/.hidden/config.json", "link/config.json", "", ".", "sorted.json\0"),
        *("no.json", "x" * 300 + ".json", "sorted.json/x.json"),
    ):
        with pytest.raises(NotServedError):
            folder.graph(name)


def test_only_what_has_changed_is_read_again(tmp_path: Path, monkeypatch):
    read: list[str] = []
    describe = folders.describe

    def counted(path: Path):
        read.append(path.parent.name)
        return describe(path)

    monkeypatch.setattr(folders, "describe", counted)
    for name in "abc":
        write(tmp_path / name, DOC)
        (tmp_path / name / "features").mkdir()
        (tmp_path / name / "features" / "5.json").write_text('{"index": 5}')
    folder = Folder(tmp_path)
    assert names(folder) == ["a", "b", "c"]
    assert sorted(read) == ["a", "b", "c"]
    folder.graph("a")
    assert names(folder) == ["a", "b", "c"]
    assert len(read) == 3  # features are not looked into either
    write(tmp_path / "b", {**DOC, "metadata": {**DOC["metadata"], "slug": "other"}})
    write(tmp_path / "d", DOC)
    (tmp_path / "a" / "graph.json").unlink()
    assert [e["slug"] for e in folder.graphs()] == ["other", "cat", "cat"]
    assert sorted(read[3:]) == ["b", "d", "features"]
    with pytest.raises(NotServedError):
        folder.graph("a")


def test_a_page_does_not_hold_the_list(tmp_path: Path):
    for name in ("one", "another-name"):
        write(tmp_path / name, DOC)
    with serving(tmp_path) as server:
        assert "another-name" not in talk(server.port)("/view/one")[2]
