"""`jaxclt serve --model --dictionary`: patches that a page asks for."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_serve import TOKEN, save
from test_serve import serving as serve
from test_serve import talk as talk_to

from jaxclt.cli import main as cli
from jaxclt.errors import InputError
from jaxclt.io.graph_file import load_graph, save_graph
from jaxclt.patching.how import How
from jaxclt.serve.app import MAX_PATCH
from jaxclt.serve.patch import BUSY, MAX_NODES, Patcher, read_change
from jaxclt.trace.pages import read_graph

GOLDEN = Path(__file__).parents[1] / "goldens" / "circuit_tracer_clt"
MODEL, DICTIONARY = GOLDEN / "model", GOLDEN / "dictionary"
PROMPT = str(np.load(GOLDEN / "graph.npz")["prompt"])
NODES = {"nodes": ["1_2_3"]}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "cat"
    args = ["--model", MODEL, "--dictionary", DICTIONARY, "--out", out]
    cli.main(["trace", PROMPT, *map(str, args)])
    return out


@pytest.fixture(scope="module")
def patcher() -> Patcher:
    return Patcher(str(MODEL), str(DICTIONARY))


@contextmanager
def serving(root: Path, patcher) -> Iterator[int]:
    with serve(root, patcher) as server:
        yield server.port


def features(folder: Path) -> list[str]:
    nodes = read_graph(folder / "graph.json")["nodes"]
    found = [n for n in nodes if n["feature_type"] == "cross layer transcoder"]
    found.sort(key=lambda n: n["influence"])
    return [n["node_id"] for n in found]


def test_the_page_patches_a_supernode_and_keeps_what_it_did(
    traced: Path, patcher: Patcher, open_url, tmp_path: Path, capsys
):
    root = tmp_path / "runs"
    folder = Path(shutil.copytree(traced, root / "cat"))
    doc = read_graph(folder / "graph.json")
    ids = features(folder)[:2]
    doc["qParams"]["supernodes"] = [["<b>pair", *ids]]
    (folder / "graph.json").write_text(json.dumps(doc))
    with serving(root, patcher) as port:
        origin = f"http://127.0.0.1:{port}"
        tab = open_url(f"{origin}/view/cat?token={TOKEN}", origin)
        tab.locator(".card").first.click()
        tab.click(".actions >> text=Patch")
        tab.fill(".patchform input", "-1")
        tab.click(".patchform >> text=Run")
        tab.wait_for_selector("#patched .result", timeout=60_000)
        assert "× −1, constrained" in tab.text_content("#patched .result")
        tab.goto(f"{origin}/view/cat")
        tab.evaluate(
            "__jaxclt.app.openPatch({name: '', ids: __jaxclt.app.groups[0].ids})"
        )
        assert tab.locator("#patched .result").count() == 1
    kept = json.loads((folder / "patches.json").read_text())
    assert kept["prompt"] == PROMPT
    (record,) = kept["patches"]
    assert record["name"] == "<b>pair"
    assert sorted(record["nodes"]) == sorted(ids)
    # The command says the same, and takes the place of the record.
    places = [
        ":".join((i.split("_")[0], i.split("_")[2], i.split("_")[1])) for i in ids
    ]
    args = ["patch", str(folder), "--feature", *places, "--scale", "-1", "--json"]
    cli.main(args)
    said = json.loads(capsys.readouterr().out)
    assert said["kl"] == pytest.approx(record["kl"], rel=1e-4)
    assert said["kl"] > 0
    kept = json.loads((folder / "patches.json").read_text())
    assert [p["name"] for p in kept["patches"]] == [", ".join(places)]
    assert "\\u003cb\\u003epair" in (folder / "index.html").read_text()


def test_the_tables_of_patch_and_view_carry_labels(traced: Path, tmp_path, capsys):
    """Nothing in a label steers the terminal, or is markup of it."""
    folder = Path(shutil.copytree(traced, tmp_path / "cat"))
    graph = load_graph(folder / "graph.npz")
    layer, feature, pos = map(int, features(folder)[0].split("_"))
    of_all = {
        f"{at}:{number}": "[red]rome\x1b[2J"
        for at, _, number in map(graph.feature, range(graph.n_features))
    }
    meta = dataclasses.replace(graph.meta, labels=of_all)
    save_graph(folder / "graph.npz", dataclasses.replace(graph, meta=meta))
    cli.main(["patch", str(folder), "--feature", f"{layer}:{pos}:{feature}"])
    said = capsys.readouterr().out
    assert "\x1b[2J" not in said
    assert "[red]rome" in " ".join(said.split())
    cli.main(["view", str(folder), "--suggest"])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "page:" in said


def test_patches_of_another_prompt_are_neither_shown_nor_kept(
    traced: Path, patcher: Patcher, tmp_path: Path
):
    folder = Path(shutil.copytree(traced, tmp_path / "cat"))
    older = {"prompt": "another", "dictionary": "x", "patches": [{"name": "old"}]}
    (folder / "patches.json").write_text(json.dumps(older))
    change = {"nodes": features(folder)[:1]}
    assert patcher.patch(folder, change) is not None
    kept = json.loads((folder / "patches.json").read_text())
    assert len(kept["patches"]) == 1
    assert kept["patches"][0]["change"] == {"scale": 0.0}


def test_a_supernode_is_patched_where_its_members_are_active(
    traced: Path, patcher: Patcher, tmp_path: Path
):
    folder = Path(shutil.copytree(traced, tmp_path / "cat"))
    active = features(folder)[0]
    layer, _, pos = map(int, active.split("_"))
    graph = load_graph(folder / "graph.npz")
    here = (graph.layer_A == layer) & (graph.pos_A == pos)
    off = min(set(range(40)) - set(graph.feature_A[here].tolist()))
    silent = f"{layer}_{off}_{pos}"
    both = patcher.patch(folder, {"nodes": [silent, active], "name": "pair"})
    alone = patcher.patch(folder, {"nodes": [active]})
    assert both is not None
    assert alone is not None
    assert both["kl"] == pytest.approx(alone["kl"], rel=1e-5)
    # The page finds what it asked for by all members.
    assert both["nodes"] == [silent, active]
    with pytest.raises(InputError, match="no feature of supernode 'off' is active"):
        patcher.patch(folder, {"nodes": [silent], "name": "off"})


def test_a_graph_of_another_model_is_refused(traced: Path, tmp_path: Path):
    folder = Path(shutil.copytree(traced, tmp_path / "cat"))
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (model / "config.json").write_text(json.dumps(config))
    other = Patcher(str(model), str(DICTIONARY))
    with pytest.raises(InputError, match="not the one that was traced"):
        other.patch(folder, {"nodes": features(folder)[:1]})


def test_model_and_dictionary_are_those_that_the_report_names(
    traced: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(traced, tmp_path / "cat"))
    change = {"nodes": features(folder)[:1]}
    record = Patcher().patch(folder, change)
    named = Patcher(str(MODEL), str(DICTIONARY)).patch(folder, change)
    assert record is not None
    assert named is not None
    assert record["kl"] == pytest.approx(named["kl"], rel=1e-5)
    report = json.loads((folder / "report.json").read_text())
    gone = {**report, "model": str(tmp_path / "nothing")}
    (folder / "report.json").write_text(json.dumps(gone))
    with pytest.raises(InputError, match="no model"):
        Patcher().patch(folder, change)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ([], 'not of type "object"'),
        ({}, '"nodes" is a required'),
        ({"nodes": []}, "nodes: .* less than 1 item"),
        ({"nodes": ["1_2_3"] * (MAX_NODES + 1)}, "more than 512 items"),
        ({"nodes": ["E_1_0"]}, "E_1_0. does not match"),
        ({"nodes": ["1_-1_0"]}, "1_-1_0. does not match"),
        ({"nodes": [5]}, '5 is not of type "string"'),
        ({"nodes": ["1_2_3" + "0" * 20]}, "does not match"),
        ({"nodes": ["1_2_\u0663"]}, "does not match"),
        ({**NODES, "scale": "0"}, 'scale: .* not of type "number"'),
        ({**NODES, "scale": float("nan")}, 'scale: .* not of type "number"'),
        ({**NODES, "scale": 1e9}, "scale: .* greater than the maximum"),
        ({**NODES, "scale": True}, 'scale: .* not of type "number"'),
        ({**NODES, "mode": "live"}, "mode: 'live' is not one of"),
        ({**NODES, "name": "x" * 999}, "name: .* longer than 300"),
        ({**NODES, "name": 5}, "name: 5 is not of type"),
    ],
)
def test_what_is_no_patch_is_refused_in_words(change: object, why: str):
    with pytest.raises(InputError, match=why):
        read_change(change)


def test_patterns_are_frozen_unless_they_are_asked_for_live():
    assert read_change(NODES)[2] == How()
    live = {**NODES, "patterns": "live", "mode": "iterative"}
    assert read_change(live)[2] == How(patterns="live", mode="iterative")


class Fake:
    """Stands for the model: answers, waits or fails as told."""

    def __init__(self) -> None:
        self.wait = threading.Event()
        self.started = threading.Event()
        self.running = threading.Lock()
        self.fail: Exception | None = None

    def patch(self, directory: Path, change):
        read_change(change)
        if not self.running.acquire(blocking=False):
            return None
        with_error, self.fail = self.fail, None
        try:
            if with_error:
                raise with_error
            self.started.set()
            self.wait.wait(5)
            return {"directory": directory.name}
        finally:
            self.running.release()


def test_requests_are_checked_before_the_model_runs(traced: Path, tmp_path: Path):
    root = tmp_path / "runs"
    shutil.copytree(traced, root / "cat")
    for name in ("other", "linked", "outside"):
        (root / name).mkdir()
        shutil.copy(traced / "graph.json", root / name)
    for name in ("graph.npz", "report.json"):
        (root / "linked" / name).symlink_to(traced / name)
    shutil.copy(traced / "graph.npz", root / "outside")
    shutil.copy(traced / "report.json", root / "outside")
    (root / "outside" / "patches.json").symlink_to(tmp_path / "elsewhere.json")
    fake = Fake()
    with serving(root, fake) as port:
        ask = talk_to(port)
        for headers, status in (
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": ""}, 403),
            ({"Content_Type": "text/plain"}, 415),
            ({"Content_Length": str(MAX_PATCH + 1)}, 413),
            ({"Content_Length": ""}, 411),
        ):
            assert save(ask, "/api/patch/cat", NODES, **headers)[0] == status
        assert save(ask, "/api/patch/cat", b"[" * 60_000)[0] == 400
        assert save(ask, "/api/patch/cat", {"nodes": [1]})[0] == 422
        for name in ("other", "linked", "outside", "../cat", "nothing"):
            assert save(ask, f"/api/patch/{name}", NODES)[0] == 404
        fake.fail = RuntimeError("RESOURCE_EXHAUSTED <b>")
        status, _, text = save(ask, "/api/patch/cat", NODES)
        assert status == 500
        assert "RESOURCE_EXHAUSTED" in text
        first = threading.Thread(target=save, args=(ask, "/api/patch/cat", NODES))
        first.start()
        assert fake.started.wait(5)
        status, _, text = save(ask, "/api/patch/cat", NODES)
        assert (status, json.loads(text)["error"]) == (409, BUSY)
        fake.wait.set()
        first.join()
        assert save(ask, "/api/patch/cat", NODES)[0] == 200
        page = ask("/view/cat")[2]
        assert '"patch":true' in page
        assert '"patch":false' in ask("/view/other")[2]
    with serving(root, None) as port:
        ask = talk_to(port)
        status, _, text = save(ask, "/api/patch/cat", NODES)
        assert status == 404
        assert "--no-patch" in text
        assert '"patch":false' in ask("/view/cat")[2]


def test_the_command_wants_both_names(tmp_path: Path, capsys):
    for one in ("--model", "--dictionary"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["serve", str(tmp_path), one, "x"])
        assert stop.value.code == 2
        assert "give both" in capsys.readouterr().err
