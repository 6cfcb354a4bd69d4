"""`jaxclt explain` and the calls that take the model again, on a traced tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import DICTIONARY, MODEL, PROMPT, run, trace

import jaxclt
from jaxclt.graph import heads
from jaxclt.graph.nodes import node_name


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trace") / "graph"
    assert trace(out, "--heads", 200) == 0
    return out


@pytest.fixture(scope="module")
def model() -> jaxclt.Model:
    return jaxclt.load_model(MODEL)


def edge(graph: jaxclt.Graph, listed: bool = True) -> tuple[str, str]:
    """Names of a strong kept edge between features."""
    assert graph.heads is not None
    A = graph.n_features
    keep = np.zeros_like(graph.pruning.keep_edge_RN)
    keep[graph.heads.row_E, graph.heads.col_E] = True
    if not listed:
        keep = graph.pruning.keep_edge_RN & ~keep
    kept = np.abs(graph.edge_RN[:A, :A]) * keep[:A, :A]
    row, col = np.unravel_index(np.argmax(kept), kept.shape)
    return node_name(graph, int(col)), node_name(graph, int(row))


def test_explain_prints_the_parts(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = jaxclt.load_graph(traced / "graph.npz")
    names = edge(graph)
    assert run("explain", traced, *names) == 0
    text = capsys.readouterr().out
    assert text.rstrip() == jaxclt.explain(graph, *names)
    assert "residual-direct" in text
    assert run("explain", traced, *names, "--json") == 0
    parts = json.loads(capsys.readouterr().out)
    assert parts["edge"] == pytest.approx(parts["direct"] + parts["attention"])


@pytest.mark.parametrize("listed", [True, False])
def test_the_model_adds_hops_and_heads_of_any_edge(
    traced: Path, listed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = jaxclt.load_graph(traced / "graph.npz")
    names = edge(graph, listed)
    kept = jaxclt.edge_parts(graph, *names)
    assert (kept.heads is not None) == listed
    assert run("explain", traced, *names, "--hops", "--json", "--max-hops", 2) == 0
    parts = json.loads(capsys.readouterr().out)
    size = 1e-5 * (abs(parts["direct"]) + abs(parts["attention"]))
    assert len(parts["hops"]) == 3
    assert sum(parts["hops"]) == pytest.approx(kept.edge, abs=size)
    assert parts["direct"] == pytest.approx(kept.direct, abs=size)
    loads = [load for _, _, load in parts["heads"]]
    assert sum(loads) + parts["other_heads"] == pytest.approx(
        parts["attention"], abs=size
    )
    if kept.heads is not None:
        np.testing.assert_allclose(parts["heads"], kept.heads, rtol=1e-5)


def test_hops_of_a_target(traced: Path, model: jaxclt.Model) -> None:
    graph = jaxclt.load_graph(traced / "graph.npz")
    dictionary = jaxclt.load_dictionary(DICTIONARY, model)
    source = node_name(graph, int(np.argmax(np.abs(graph.edge_RN[-1]))))
    target = str(graph.n_targets - 1)
    text = jaxclt.explain(graph, source, target, model=model, dictionary=dictionary)
    assert "3 or more hops" in text
    parts = jaxclt.edge_parts_with_model(
        graph, source, target, model=model, dictionary=dictionary
    )
    assert parts.hops is not None
    assert sum(parts.hops) == pytest.approx(parts.edge, rel=1e-4)


def test_another_model_or_dictionary_is_refused(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = edge(jaxclt.load_graph(traced / "graph.npz"))
    assert run("explain", traced, *names, "--hops", "--dictionary", "neurons:3") == 2
    assert "another dictionary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("0:0:99999", "0"), "no node"),
        (("0", "0"), "is a target"),
        (("embed 0", "0", "--max-hops", 0), "--max-hops 0"),
    ],
)
def test_bad_input_exits_with_one_line(
    traced: Path, args: tuple, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", traced, *args) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert run("explain", traced / "nothing", "embed 0", "0") == 2
    assert "no graph at" in capsys.readouterr().err
    assert trace(traced, "--heads", -1) == 2


def test_heads_of_a_padded_prompt_compile_once(model: jaxclt.Model) -> None:
    dictionary = jaxclt.load_dictionary(DICTIONARY, model)
    jaxclt.attribute(model, dictionary, "w7 w31 w7 w55", heads=50)
    before = heads._push._cache_size()
    graph = jaxclt.attribute(model, dictionary, "w12 w90 w3 w44 w7", heads=50)
    assert heads._push._cache_size() == before
    assert graph.heads is not None
    edge_E = graph.edge_RN[graph.heads.row_E, graph.heads.col_E]
    np.testing.assert_allclose(
        graph.heads.edge, edge_E, rtol=0, atol=1e-5 * np.abs(edge_E).max()
    )


def test_everything_else_of_a_traced_prompt(traced: Path, model: jaxclt.Model) -> None:
    """Total effects, paths from any node, and features one ablation away."""
    graph = jaxclt.load_graph(traced / "graph.npz")
    dictionary = jaxclt.load_dictionary(DICTIONARY, model)
    effect_KA = jaxclt.solve_total_effect(graph)
    A = graph.n_features
    strongest = int(np.argmax(np.abs(effect_KA[0])))
    # All paths from a feature to a target make up its total effect on it.
    paths = jaxclt.strongest_paths(
        graph, start=node_name(graph, strongest), end=A, k=20_000, share=False
    )
    total = sum(path.sign * path.strength for path in paths)
    assert len(paths) < 20_000
    assert total == pytest.approx(effect_KA[0, strongest], rel=1e-3)
    found = jaxclt.inhibition(graph, model, dictionary)
    released = found.released
    assert len(released.u_P)
    assert (released.gap_P > 0).all()
    with pytest.raises(jaxclt.InputError, match="has no thresholds"):
        jaxclt.inhibition(graph, model, jaxclt.load_dictionary("neurons:3", model))
    assert graph.meta.prompt == PROMPT
