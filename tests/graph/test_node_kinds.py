"""A new kind of node is one row of a table: all that follows a graph takes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cases import case_graph, close, share_matrix, walk_visits

from jaxclt.errors import InputError
from jaxclt.graph.certificate import certificate
from jaxclt.graph.explain import edge_parts
from jaxclt.graph.graph import Graph
from jaxclt.graph.influence import solve_influence
from jaxclt.graph.kinds import KINDS, SOURCES, NodeKind
from jaxclt.graph.layout import Layout
from jaxclt.graph.nodes import find_column, find_node, find_row, node_name, short_name
from jaxclt.graph.paths import strongest_paths
from jaxclt.graph.prune import prune, restrict
from jaxclt.graph.scores import path_length_curve, scores
from jaxclt.graph.shares import shares_total
from jaxclt.graph.supernodes import suggest_supernodes, supernode_graph
from jaxclt.io.graph_file import load_graph, save_graph
from jaxclt.types import Supernode
from jaxclt.viewer.graph_json import graph_json, validate
from jaxclt.viewer.page import page

pytestmark = pytest.mark.usefixtures("x64")

BIAS = NodeKind(
    axes="LT",
    names=("bias {layer}:{pos}",),
    label="L{layer} bias@{pos}",
    ends="bias",
    kept_by=("paper",),
    drawn="mlp bias",
    number="-2",
    js_id="{layer}_-2-{pos}",
    feature="-2",
    clerp="bias of layer {layer}",
)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> tuple[Graph, Graph, np.ndarray]:
    """A graph, the same with two thirds of its bias moved to nodes, and in what parts.

    Parts of one row have one sign, so that every total and share stays what it was.
    """
    monkeypatch.setitem(KINDS, "bias", BIAS)
    graph = case_graph("clt")
    share_LT = np.arange(1.0, 1 + graph.n_layers * graph.n_tokens) ** 2
    share_LT = share_LT.reshape(graph.n_layers, -1) * 2 / 3 / share_LT.sum()
    edge_RM = graph.bias_R[:, None] * share_LT.ravel()
    edge_RN = np.concatenate([graph.edge_RN, edge_RM], 1)
    assert np.abs(graph.bias_R).min() > 0
    moved = dataclasses.replace(
        graph,
        meta=dataclasses.replace(graph.meta, sources=(*SOURCES, "bias")),
        edge_RN=edge_RN,
        bias_R=graph.bias_R / 3,
        influence_N=np.zeros(edge_RN.shape[1]),
        direct_RN=None,
        derivative_KN=None,
        heads=None,
    )
    influence_N = solve_influence(edge_RN, shares_total(moved), graph.target_prob_K)
    moved = dataclasses.replace(moved, influence_N=influence_N)
    return graph, dataclasses.replace(moved, pruning=prune(moved)), share_LT


def test_its_columns_come_last(split) -> None:
    graph, moved, _ = split
    old, new = graph.layout, moved.layout
    assert new.n_columns == moved.edge_RN.shape[1]
    assert new.nodes["bias"].start == old.n_columns
    for kind in SOURCES:
        assert new.nodes[kind] == old.nodes[kind]
    layer_N, pos_N = new.places(graph.layer_A, graph.pos_A)
    for node in range(new.n_columns):
        place = new.place(node)
        if "L" in place:
            assert new.at(new.kind(node), *place.values()) == node
            assert (place["L"], place["T"]) == (layer_N[node], pos_N[node])
    assert new.node_of(new.target_rows.start) == new.nodes["target"].start
    assert new.row_of(new.nodes["target"].start + 1) == new.target_rows.start + 1


def test_rows_still_sum_and_it_counts_as_what_it_is(split) -> None:
    graph, moved, _ = split
    want, got = certificate(graph), certificate(moved)
    assert got.max_relative_row_error < 1e-13
    for share in ("bias_share", "rest_share", "error_share"):
        assert getattr(got, share) == pytest.approx(getattr(want, share), rel=1e-12)


def test_influence_is_that_of_the_walk(split) -> None:
    graph, moved, share_LT = split
    old = graph.layout.n_columns
    close(moved.influence_N[:old], graph.influence_N, 1e-13)
    prob = moved.target_prob_K.sum()
    walk = walk_visits(moved, share_matrix(moved))[: moved.layout.n_columns] * prob
    close(moved.influence_N, walk, 1e-13)
    bias = moved.influence_N[moved.layout.nodes["bias"]]
    close(bias / bias.sum(), share_LT.ravel() / share_LT.sum(), 1e-12)


def test_scores_are_those_of_the_bias_that_it_was(split) -> None:
    graph, moved, _ = split
    got, want = scores(moved), scores(graph)
    assert dataclasses.asdict(got) == pytest.approx(dataclasses.asdict(want))
    close(path_length_curve(moved), path_length_curve(graph), 1e-12)
    # As an error it would be one.
    KINDS["bias"] = dataclasses.replace(BIAS, ends="error")
    other = scores(moved)
    moved_share = 2 / 3 * want.bias_share
    assert other.error_share == pytest.approx(want.error_share + moved_share)
    assert other.bias_share == pytest.approx(want.bias_share - moved_share)
    assert other.replacement < want.replacement


def test_pruning_keeps_it_by_the_table(split) -> None:
    _, moved, _ = split
    columns = moved.layout.nodes["bias"]
    assert prune(moved, node_threshold=0.5).keep_N[columns].all()
    KINDS["bias"] = dataclasses.replace(BIAS, kept_by=())
    few = prune(moved, node_threshold=0.9)
    assert 0 < few.keep_N[columns].sum() < len(few.keep_N[columns])
    small = restrict(dataclasses.replace(moved, pruning=few))
    assert small.layout.nodes["bias"].stop == small.edge_RN.shape[1]
    total_R = small.edge_RN.sum(1) + small.bias_R + small.rest_R
    close(total_R, small.readout_R, 1e-12)
    got = scores(moved, few)
    ends = got.embedding_share, got.error_share, got.bias_share, got.unexplored_share
    assert sum(ends) == pytest.approx(1)


def test_it_is_found_by_every_name(split) -> None:
    _, moved, _ = split
    node = moved.layout.at("bias", 2, 3)
    assert node_name(moved, node) == "L2 bias@3"
    assert short_name(moved, node) == "bias 2:3"
    for name in ("bias 2:3", "L2 bias@3", "2_-2_3"):
        assert find_node(moved, name) == find_column(moved, name) == node
    assert find_node(moved, "2_-1_3") == moved.layout.at("error", 2, 3)
    with pytest.raises(InputError, match=r"layers are 0\.\.3, positions 0\.\.5"):
        find_node(moved, "bias 4:0")
    with pytest.raises(InputError, match="nothing leads there"):
        find_row(moved, "bias 2:3")
    with pytest.raises(InputError, match="'bias layer:position', or a target"):
        find_node(moved, "nonsense")


def test_paths_parts_and_groups_take_it(split) -> None:
    graph, moved, share_LT = split
    (path,) = strongest_paths(moved, start="bias 2:3", k=1)
    assert node_name(moved, path.nodes[0]) == "L2 bias@3"
    parts = edge_parts(moved, "bias 2:3", "target 0")
    want = graph.bias_R[graph.target_rows.start] * share_LT[2, 3]
    assert parts.edge == pytest.approx(want)
    two = [Supernode(name, (f"bias {name}",)) for name in ("2:3", "3:1")]
    small = supernode_graph(moved, [*suggest_supernodes(moved), *two])
    ratio = small.influence_G[-2] / small.influence_G[-1]
    assert ratio == pytest.approx(share_LT[2, 3] / share_LT[3, 1])


def test_graph_json_and_the_page_show_it(split) -> None:
    _, moved, _ = split
    doc = graph_json(moved, slug="split")
    validate(doc)
    found = [node for node in doc["nodes"] if node["feature_type"] == "mlp bias"]
    linked = {link["source"] for link in doc["links"]}
    assert {node["node_id"] for node in found} <= linked
    one = next(node for node in found if node["node_id"] == "2_-2_3")
    assert one["jsNodeId"] == "2_-2-3"
    assert (one["layer"], one["ctx_idx"], one["feature"]) == ("2", 3, -2)
    assert one["clerp"] == "bias of layer 2"
    assert "abs_input" not in one
    assert '"mlp bias"' in page(doc)


def test_a_file_says_which_kinds_it_has(split, tmp_path: Path) -> None:
    graph, moved, _ = split
    assert "sources" not in graph.meta.to_json()
    save_graph(tmp_path / "graph.npz", moved)
    again = load_graph(tmp_path / "graph.npz")
    assert again.meta.sources == moved.meta.sources
    np.testing.assert_array_equal(again.edge_RN, moved.edge_RN)
    del KINDS["bias"]
    with pytest.raises(InputError, match="a kind that is not known: bias"):
        load_graph(tmp_path / "graph.npz")
    KINDS["bias"] = BIAS


def test_features_come_first() -> None:
    sizes = {"n_features": 3, "n_layers": 2, "n_tokens": 2}
    assert Layout(**sizes).nodes["feature"] == slice(0, 3)
    assert Layout(**sizes, sources=("feature", "embed")).n_columns == 5


@pytest.mark.parametrize(("axes", "n"), [("L", 4), ("T", 6), ("", 1)])
def test_kinds_may_lack_layers_or_positions(
    monkeypatch: pytest.MonkeyPatch, axes: str, n: int
) -> None:
    monkeypatch.setitem(KINDS, "bias", dataclasses.replace(BIAS, axes=axes))
    graph = case_graph("clt")
    layout = dataclasses.replace(graph.layout, sources=(*SOURCES, "bias"))
    assert layout.n_columns == graph.layout.n_columns + n
    places = layout.places(graph.layer_A, graph.pos_A)[:, layout.nodes["bias"]]
    want = {"L": np.stack([np.arange(4), 0 * np.arange(4)])}
    want |= {"T": np.stack([-1 + 0 * np.arange(6), np.arange(6)])}
    np.testing.assert_array_equal(places, want.get(axes, [[-1], [0]]))
    last = layout.nodes["bias"].stop - 1
    assert layout.at("bias", *layout.place(last).values()) == last
