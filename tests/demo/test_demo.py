"""The demo's case: supernodes by family, and a swap that changes the last digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jaxclt
from jaxclt.cli.demo import family_supernodes, load_case, swap_edits
from jaxclt.cli.main import main


@pytest.fixture(scope="module")
def traced():
    model = jaxclt.load_model("addition")
    clt = jaxclt.load_dictionary("addition-clt", model)
    case = load_case()
    graph = jaxclt.attribute(model, clt, case.prompt, tolerance=0.0)
    return model, clt, case, graph


def test_the_graph_is_exact_and_labelled(traced):
    *_, case, graph = traced
    assert case.prompt == "calc: 36+59="
    assert graph.meta.target_tokens[0] == "95"
    assert jaxclt.certificate(graph).max_relative_row_error < 1e-4
    found = jaxclt.scores(graph).completeness_logit_edges
    assert found == pytest.approx(0.976, abs=1e-3)
    assert len(graph.meta.labels) > 10
    assert any("9" in text for text in graph.meta.labels.values())
    paths = jaxclt.describe_paths(graph, jaxclt.strongest_paths(graph, k=20))
    assert "[" in paths


def test_families_become_supernodes(traced):
    *_, case, graph = traced
    small = jaxclt.supernode_graph(graph, family_supernodes(graph, case.families))
    assert {"lookup table", "ends in", "output 95"} <= set(small.names)
    index = {name: g for g, name in enumerate(small.names)}
    # last digits go into the tables, not magnitudes
    tables = small.size_GG[index["lookup table"]]
    assert tables[index["token 6 at 2"]] > 2 * tables[index["token 3 at 1"]]


def test_the_swap_changes_the_last_digit(traced):
    model, clt, case, graph = traced
    edits = swap_edits(model, clt, case)
    layer_E = [edit.layer for edit in edits]
    done = jaxclt.patch(model, clt, graph, edits, layers=(min(layer_E), max(layer_E)))
    assert done.top_before[0][0] == "95"
    assert done.top_after[0][0] == case.expected == "94"


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys):
    main(["demo", "--out", str(tmp_path / "demo"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["patch"]["top_after"][0][0] == "94"
    for name in ("patch", "ablation"):
        row = found[name]["predicted"][0]
        assert (row["token"], row["as_predicted"]) == ("95", True)
    target = found["ablation"]["targets"][0]
    assert target["p_before"] - target["p_after"] < 0.01
    assert "the last norm, which the graph holds" in found["validation"]["verdict"]
    names = {"graph.npz", "report.json", "graph.json", "index.html", "validation.json"}
    assert names <= {file.name for file in (tmp_path / "demo").iterdir()}
    doc = json.loads((tmp_path / "demo/graph.json").read_text("utf-8"))
    assert len(doc["qParams"]["supernodes"]) >= 3
    assert doc["qParams"]["pinnedIds"]
