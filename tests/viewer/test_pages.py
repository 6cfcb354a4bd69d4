"""The page of a directory: what lies beside the graph, and what readers saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_graph_json import make_graph
from test_page import FEATURE, REPORT, VALIDATION, data_of

from jaxclt.api import show
from jaxclt.errors import InputError
from jaxclt.io.published import dashboards, pairs
from jaxclt.trace.pages import (
    carry_over,
    directory_page,
    read_graph,
    traced_digest,
    write_page,
)
from jaxclt.viewer.graph_json import graph_json, validate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    doc = graph_json(make_graph(), slug="cat")
    same = {"prompt": doc["metadata"]["prompt"], "dictionary": "tiny-clt"}
    report = {**REPORT, **same, "certificate": {}}
    for name, value in {
        "graph": doc,
        "report": report,
        "validation": {**VALIDATION, **same},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def data(folder: Path, **parts) -> dict:
    return data_of(write_page(folder, **parts).read_text(encoding="utf-8"))


def test_the_page_has_scores_validation_and_features(folder: Path):
    doc = read_graph(folder / "graph.json")
    number = next(n["feature"] for n in doc["nodes"] if n["feature_type"] == FEATURE)
    (folder / "features").mkdir()
    (folder / "features" / f"{number}.json").write_text('{"index": 1}')
    (folder / "features" / "999999999.json").write_text("{")  # of no node
    found = data(folder)
    assert found["report"]["scores"] == REPORT["scores"]
    assert found["validation"]["verdict"] == VALIDATION["verdict"]
    assert found["graph"]["jaxclt"]["features"] == {str(number): {"index": 1}}


def test_published_dictionaries_have_addresses_of_their_features(
    folder: Path, open_page
):
    doc = read_graph(folder / "graph.json")
    node = next(n["node_id"] for n in doc["nodes"] if n["feature_type"] == FEATURE)
    assert "dashboards" not in data(folder)["graph"]["jaxclt"]
    doc["jaxclt"]["dictionary"] = "mwhanna/qwen3-4b-transcoders@main"
    tab = open_page(directory_page(folder, doc=doc))
    tab.evaluate("id => __jaxclt.select(id)", node)
    link = tab.locator(".actions a")
    layer, feature, _ = node.split("_")
    assert link.get_attribute("href") == (
        f"https://www.neuronpedia.org/qwen3-4b/{layer}-transcoder-hp/{feature}"
    )
    assert "noopener" in link.get_attribute("rel").split()
    for pattern in ("javascript:alert({layer})", "http://x.example/{feature}", 5):
        doc["jaxclt"] = {"dictionary": "mine", "dashboards": pattern}
        tab = open_page(directory_page(folder, doc=doc))
        tab.evaluate("id => __jaxclt.select(id)", node)
        assert tab.locator(".actions a").count() == 0
    for pair in pairs():
        if pair.dashboards:
            assert dashboards(pair.dictionary) == pair.dashboards
            assert pair.dashboards.startswith("https://")
            assert pair.dashboards.count("{layer}") == 1
            assert pair.dashboards.endswith("/{feature}")


def test_files_of_another_prompt_are_left_out(folder: Path):
    for name in ("report", "validation"):
        value = json.loads((folder / f"{name}.json").read_text())
        value["prompt" if name == "report" else "dictionary"] = "another"
        (folder / f"{name}.json").write_text(json.dumps(value))
    found = data(folder)
    assert found["report"] is None
    assert found["validation"] is None


def test_validation_of_an_earlier_trace_is_left_out(folder: Path):
    """Same prompt and dictionary, other targets for example."""
    paths = [folder / f"{name}.json" for name in ("report", "validation")]
    report, own = (json.loads(path.read_text()) for path in paths)
    report["identity"] = {"targets": [" Paris"]}
    paths[0].write_text(json.dumps(report))
    paths[1].write_text(json.dumps(own | {"traced": traced_digest(report)}))
    assert data(folder)["validation"] is not None
    report["identity"] = {"targets": [" Rome"]}
    paths[0].write_text(json.dumps(report))
    assert data(folder)["validation"] is None


def test_labels_and_groups_outlive_another_pruning(folder: Path):
    saved = read_graph(folder / "graph.json")
    node = next(n for n in saved["nodes"] if n["feature_type"] == FEATURE)
    node["clerp"] = "mine"
    saved["qParams"]["supernodes"] = [["pair", node["node_id"], "9_9_9"]]
    fresh = show(make_graph(n_links=150)).doc
    carried = carry_over(fresh, saved)
    validate(carried)
    labels = {n["node_id"]: n["clerp"] for n in carried["nodes"]}
    assert labels[node["node_id"]] == "mine"
    found = data(folder, doc=carried)
    # Scores of the new pruning, not the report's.
    assert found["report"] == fresh["jaxclt"]["scores"]
    assert found["graph"]["qParams"]["supernodes"] == saved["qParams"]["supernodes"]


def test_a_page_of_two_graphs_and_in_a_notebook():
    page = show(make_graph(), compare=make_graph(n_features=20), validation=VALIDATION)
    found = data_of(page.html)
    assert len(found["other"]["nodes"]) < len(found["graph"]["nodes"])
    assert found["validation"] == VALIDATION
    frame = page._repr_html_()
    assert 'sandbox="allow-scripts allow-downloads"' in frame
    assert frame.count('"') == 6  # of the frame's own three attributes


@pytest.mark.parametrize("text", ["{", "[]", '{"nodes": []}'])
def test_a_file_that_is_no_graph_is_an_input_error(folder: Path, text: str):
    (folder / "graph.json").write_text(text)
    with pytest.raises(InputError):
        write_page(folder)
    (folder / "graph.json").unlink()
    with pytest.raises(InputError, match=r"no graph\.json"):
        write_page(folder)
