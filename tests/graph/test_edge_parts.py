"""Provenance through the whole pipeline: what a traced graph says of its edges."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import (
    case,
    case_active,
    close,
    graph_rows,
    layer_cut,
    random_graph,
    recorded,
    share_matrix,
    solved,
)

from jaxclt.errors import InputError
from jaxclt.graph import heads, provenance
from jaxclt.graph.attribute import AttributeConfig
from jaxclt.graph.explain import edge_parts
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import find_column, find_node, find_row, node_name
from jaxclt.graph.paths import describe_paths, strongest_paths
from jaxclt.graph.prune import prune, restrict
from jaxclt.io.graph_file import load_graph, save_graph
from jaxclt.viewer.graph_json import graph_json, validate

pytestmark = pytest.mark.usefixtures("x64")

ALL = 1 << 30
CONFIGS = {
    "clt": AttributeConfig(max_features=None, heads=ALL),
    "plt": AttributeConfig(max_features=None, heads=ALL),
    "skip": AttributeConfig(max_features=None, heads=ALL),
    "half": AttributeConfig(max_features=30, heads=40),
    "peer": AttributeConfig(max_features=40, heads=ALL, convention="circuit-tracer"),
}
CASE = {"half": "clt", "peer": "clt"}


@functools.cache
def graph(name: str) -> Graph:
    with jax.enable_x64(True):
        return case(CASE.get(name, name)).graph(CONFIGS[name])


def direct(g: Graph) -> np.ndarray:
    assert g.edge_direct_RN is not None
    return g.edge_direct_RN


def places(g: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Positions of rows and columns."""
    L, T = g.n_layers, g.n_tokens
    pos_R = np.r_[g.pos_A, np.full(g.n_targets, T - 1)]
    return pos_R, np.r_[g.pos_A, np.tile(np.arange(T), L), np.arange(T)]


@pytest.mark.parametrize("name", CONFIGS)
def test_direct_and_heads_sum_to_the_edges_of_the_graph(name: str) -> None:
    """Maths 7.2, 7.4: of a traced graph, whatever was selected and kept."""
    g = graph(name)
    table = g.heads
    assert table is not None
    n_kept = int(g.pruning.keep_edge_RN.sum())
    assert len(table.row_E) == min(CONFIGS[name].heads, n_kept) > 20
    close(table.edge, g.edge_RN[table.row_E, table.col_E], 1e-12)
    np.testing.assert_array_equal(table.direct_E, direct(g)[table.row_E, table.col_E])
    assert g.pruning.keep_edge_RN[table.row_E, table.col_E].all()
    pos_R, pos_N = places(g)
    assert not direct(g)[pos_R[:, None] != pos_N].any()
    same = (pos_R[:, None] == pos_N) & (g.edge_RN != 0)
    assert (direct(g)[same] != 0).mean() > 0.99
    assert not direct(g)[g.edge_RN == 0].any()


@pytest.mark.parametrize("name", ["half", "skip"])
def test_other_splits_of_a_traced_graph_agree(name: str) -> None:
    """Maths 7.3, 7.5: hops, and a layer's cut, sum to the edges; 0 hops are direct.

    Sources outside the graph are in neither.
    """
    g, t, active = (
        graph(name),
        case(CASE.get(name, name)),
        case_active(CASE.get(name, name)),
    )
    nodes = provenance.graph_active(g, active)
    p = dataclasses.replace(recorded(t, active), active=nodes)
    rows = graph_rows(p, t.targets.vec_KD)
    hop_QRN = provenance.hop_spectrum(p, rows, max_hops=2)
    close(hop_QRN.sum(0), g.edge_RN, 1e-12)
    close(hop_QRN[0], direct(g), 1e-12)
    bypass_RN, through_HRN = layer_cut(p, rows, 1)
    close(bypass_RN + through_HRN.sum(0), g.edge_RN, 1e-12)


def test_the_strongest_edges_are_listed() -> None:
    """By share of the row times its influence, as graph.json orders its links."""
    g = graph("half")
    links = graph_json(g, slug="g")["links"][: CONFIGS["half"].heads]
    assert g.heads is not None
    listed = set(zip(g.heads.row_E.tolist(), g.heads.col_E.tolist(), strict=True))
    assert {
        (find_row(g, link["target"]), find_column(g, link["source"])) for link in links
    } == listed


@pytest.mark.parametrize("convention", ["paper", "circuit-tracer"])
def test_edges_are_ranked_by_shares_of_whole_rows(convention: str) -> None:
    """Bias and rest are part of a row: heads and links go where influence does."""
    g = random_graph(2, counts=(5, 6, 4), convention=convention)
    bias_R = np.where(np.arange(len(g.edge_RN)) % 3 == 0, 20.0, 0.1)
    g = solved(dataclasses.replace(g, bias_R=bias_R))
    share = share_matrix(g)
    visit_R = np.r_[g.influence_N[: g.n_features], g.target_prob_K]
    N = g.edge_RN.shape[1]
    row = np.r_[np.arange(g.n_features), N + np.arange(g.n_targets)]
    through_RN = visit_R[:, None] * share[row, :N]
    want = np.argsort(-through_RN, axis=None, kind="stable")[:12]
    row_E, col_E = heads.strongest_kept(g, 12)
    assert sorted(want) == sorted(row_E * N + col_E)
    links = graph_json(g, slug="g")["links"][:12]
    found = [
        find_row(g, link["target"]) * N + find_column(g, link["source"])
        for link in links
    ]
    assert found == want.tolist()


@pytest.mark.parametrize("name", ["clt", "peer"])
def test_restricting_cuts_the_parts_with_the_graph(name: str) -> None:
    g = graph(name)
    tight = dataclasses.replace(
        g, pruning=prune(g, node_threshold=0.4, edge_threshold=0.7)
    )
    small = restrict(tight)
    assert small.direct_RN is not None
    assert small.heads is not None
    assert direct(small).shape == small.edge_RN.shape != g.edge_RN.shape
    assert not direct(small)[small.edge_RN == 0].any()
    table = small.heads
    assert 0 < len(table.row_E) < len(g.heads.row_E if g.heads else ())
    close(table.edge, small.edge_RN[table.row_E, table.col_E], 1e-12)
    # The same edges by name.
    for r, c in zip(table.row_E[:20], table.col_E[:20], strict=True):
        names = node_name(small, int(c)), node_name(small, row_number(small, int(r)))
        ours, full = edge_parts(small, *names), edge_parts(g, *names)
        assert (
            dataclasses.replace(
                ours, row=full.row, col=full.col, share=full.share, kept=full.kept
            )
            == full
        )
    # Every kept edge was listed, so every one still is.
    row, col = np.nonzero(small.pruning.keep_edge_RN)
    listed = set(zip(table.row_E.tolist(), table.col_E.tolist(), strict=True))
    kept_before = {
        (r, c)
        for r, c in zip(row.tolist(), col.tolist(), strict=True)
        if edge_parts(
            g, node_name(small, c), node_name(small, row_number(small, r))
        ).kept
    }
    assert kept_before <= listed


def row_number(g: Graph, row: int) -> int:
    """Number of the node a row belongs to."""
    return row if row < g.n_features else row - g.n_features + g.edge_RN.shape[1]


@pytest.mark.parametrize("name", ["half", "peer"])
def test_files_keep_the_parts(name: str, tmp_path: Path) -> None:
    g = graph(name)
    save_graph(tmp_path / "g.npz", g)
    back = load_graph(tmp_path / "g.npz")
    np.testing.assert_array_equal(direct(back), direct(g))
    assert back.direct_RN is not None
    assert g.direct_RN is not None
    assert back.direct_RN.nnz == g.direct_RN.nnz
    assert back.heads is not None
    for field in dataclasses.fields(back.heads):
        ours, theirs = getattr(back.heads, field.name), getattr(g.heads, field.name)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    with np.load(tmp_path / "g.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["edge_direct_RN"], direct(g))


def test_files_of_earlier_versions_have_no_parts(tmp_path: Path) -> None:
    g = random_graph()
    save_graph(tmp_path / "g.npz", g)
    back = load_graph(tmp_path / "g.npz")
    assert back.direct_RN is back.heads is back.edge_direct_RN is None
    assert restrict(back).direct_RN is None
    assert "direct" not in graph_json(back, slug="g")["links"][0]
    node = node_name(g, int(np.flatnonzero(g.edge_RN[-1])[0]))
    assert "trace the prompt again" in edge_parts(back, node, "1").text()


@pytest.mark.parametrize(
    "change",
    [
        {"edge_direct_RN": np.zeros((2, 2))},
        {"edge_direct_RN": np.zeros((1, 1), np.int32)},
        {"heads_row_E": np.zeros(3, np.int32)},
        {"heads_col_E": np.full(40, 1 << 20, np.int32)},
        {"heads_rest_E": None},
    ],
)
def test_files_whose_parts_do_not_fit_are_refused(change: dict, tmp_path: Path) -> None:
    save_graph(tmp_path / "g.npz", graph("half"))
    with np.load(tmp_path / "g.npz", allow_pickle=False) as file:
        arrays = dict(file) | change
    with (tmp_path / "g.npz").open("wb") as stream:
        np.savez(stream, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(InputError, match="not a complete graph file"):
        load_graph(tmp_path / "g.npz")


# -- explaining an edge ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["clt", "half", "peer"])
def test_explained_parts_add_up(name: str) -> None:
    """For every kept edge; heads are listed for all, some, all of them."""
    g = graph(name)
    n_listed = 0
    row, col = np.nonzero(g.pruning.keep_edge_RN)
    for r, c in zip(row.tolist(), col.tolist(), strict=True):
        parts = edge_parts(g, node_name(g, c), node_name(g, row_number(g, r)))
        assert (parts.row, parts.col, parts.edge) == (r, c, g.edge_RN[r, c])
        assert parts.direct is not None
        assert parts.attention is not None
        size = abs(parts.direct) + abs(parts.attention)
        assert abs(parts.direct + parts.attention - parts.edge) <= 1e-12 * size
        assert parts.kept
        assert 0 < parts.share <= 1
        if parts.heads is not None:
            n_listed += 1
            loads = [load for _, _, load in parts.heads]
            assert parts.other_heads is not None
            found = sum(loads) + parts.other_heads
            scale = sum(map(abs, loads)) + abs(parts.edge)
            assert abs(found - parts.attention) <= 1e-12 * scale
            assert sorted(loads, key=abs, reverse=True) == loads
    assert g.heads is not None
    assert n_listed == len(g.heads.row_E)


def test_the_text_lists_the_parts() -> None:
    parts = edge_parts(graph("half"), *strongest_names(graph("half")))
    parts = dataclasses.replace(
        parts,
        source="a",
        target="b",
        edge=4.0,
        share=0.25,
        direct=1.0,
        attention=3.0,
        heads=((3, 1, 2.0), (0, 7, -0.5)),
        other_heads=1.5,
        hops=(1.0, 2.0, 1.0),
    )
    assert parts.text().splitlines() == [
        "a -> b",
        "edge                           +4   100.0%",
        "residual-direct                +1    25.0%",
        "attention-mediated             +3    75.0%",
        "  last head 3.1                +2    50.0%",
        "  last head 0.7              -0.5   -12.5%",
        "  other heads                +1.5    37.5%",
        "0 hops                         +1    25.0%",
        "1 hops                         +2    50.0%",
        "2 or more hops                 +1    25.0%",
        "25.00% of what the target reads; shown",
        "response: not in this file; trace with --response",
    ]


def strongest_names(g: Graph) -> tuple[str, str]:
    assert g.heads is not None
    at = int(np.argmax(np.abs(g.heads.edge)))
    row, col = int(g.heads.row_E[at]), int(g.heads.col_E[at])
    return node_name(g, col), node_name(g, row_number(g, row))


def test_the_text_says_what_its_features_do(tmp_path: Path) -> None:
    """From a saved graph too; a label steers no terminal and is part of no name."""
    g = graph("clt")
    source = int(np.argmax(np.abs(g.edge_RN[g.n_features, : g.n_features])))
    key = ":".join(map(str, g.feature(source)))
    said = {key: {"label": "says Paris\x1b[2J\n -> x"}}
    meta = dataclasses.replace(g.meta, labels={}, said=said)
    save_graph(tmp_path / "g.npz", dataclasses.replace(g, meta=meta))
    back = load_graph(tmp_path / "g.npz")
    name = node_name(back, source)
    parts = edge_parts(back, name, "0")
    assert (parts.source, parts.target_label) == (name, "")
    first = parts.text().splitlines()[0]
    assert first == f"{name} [says Paris\\u001b[2J\\n -> x] -> {parts.target}"


@pytest.mark.parametrize("name", ["clt", "peer"])
def test_every_name_of_a_node_finds_it(name: str) -> None:
    """As paths write it, as graph.json does, and short."""
    g = graph(name)
    A, T, N = g.n_features, g.n_tokens, g.edge_RN.shape[1]
    for node in range(N + g.n_targets):
        assert find_node(g, node_name(g, node)) == node
    for node in graph_json(g, slug="g")["nodes"]:
        at = find_node(g, node["node_id"])
        want = {"embedding": g.embed_cols.start, "logit": N}.get(
            node["feature_type"], 0
        )
        assert at >= want
        if node["feature_type"] == "cross layer transcoder":
            assert (g.layer_A[at], g.pos_A[at]) == (int(node["layer"]), node["ctx_idx"])
    for i in range(A):
        short = f"{g.layer_A[i]}:{g.pos_A[i]}:{g.feature_A[i]}"
        assert find_column(g, short) == find_row(g, short) == i
    assert find_column(g, f"error 2:{T - 1}") == A + 2 * T + T - 1
    assert find_column(g, "embed 1") == g.embed_cols.start + 1
    for k, token in enumerate(g.meta.target_tokens):
        assert find_row(g, str(k)) == find_row(g, f"target {k}") == A + k
        assert find_row(g, token) == find_row(g, token.strip()) == A + k


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("9:0:1", "0", "no node .* layer:position:feature"),
        ("0:0:99999", "0", "not active there"),
        ("0_99999_0", "0", "not active there"),
        ("error 9:0", "0", r"layers are 0\.\.3, positions 0\.\.5"),
        ("embed 6", "0", r"positions 0\.\.5"),
        ("9" * 5000 + ":0:0", "0", "no node"),
        ("E_1_77", "0", "positions"),
        ("\x1b[31m", "0", r"no node \"\\u001b\[31m\""),
        ("0", "1", "is a target of the graph"),
        ("embed 0", "embed 1", "is an input of the graph"),
        ("embed 0", "error 1:1", "is an input of the graph"),
        ("embed 0", "99", "targets are 0 "),
        ("embed 0", "no such token", "targets are 0 "),
        ("embed 0", "99_1_5", "targets are 0 "),
    ],
)
def test_unknown_nodes_say_what_there_is(source: str, target: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        edge_parts(graph("clt"), source, target)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_edges_that_are_not_there_say_why() -> None:
    g, peer = graph("clt"), graph("peer")
    low, high = node_name(g, 0), node_name(g, g.n_features - 1)
    early = int(np.argmin(g.pos_A[g.layer_A == 3])) + int((g.layer_A < 3).sum())
    for source, target, message in (
        (high, low, "layers below"),
        (f"embed {g.pos_A[early] + 1}", node_name(g, early), "after the target"),
    ):
        with pytest.raises(InputError, match=message):
            edge_parts(g, source, target)
    with pytest.raises(InputError, match="no node in this convention"):
        edge_parts(peer, "error 0:0", "0")
    g0 = dataclasses.replace(g, attributed_R=np.zeros_like(g.attributed_R))
    with pytest.raises(InputError, match="were not computed"):
        edge_parts(g0, high, low)


def test_a_pruned_file_says_that_it_is_one() -> None:
    g = graph("clt")
    tight = prune(g, node_threshold=0.3)
    small = restrict(dataclasses.replace(g, pruning=tight))
    gone = int(np.flatnonzero(~tight.keep_N[: g.n_features])[0])
    with pytest.raises(InputError, match=r"pruned from this file .*--save full"):
        edge_parts(small, node_name(g, gone), "0")


def test_same_target_texts_are_told_apart() -> None:
    g = graph("clt")
    same = dataclasses.replace(g.meta, target_tokens=(" a", "a ") * 5)
    meta = dataclasses.replace(same, target_tokens=same.target_tokens[: g.n_targets])
    g = dataclasses.replace(g, meta=meta)
    with pytest.raises(InputError, match="several targets"):
        find_node(g, " a")
    assert find_node(g, "target 1") == g.edge_RN.shape[1] + 1


def test_a_target_is_found_by_number_token_text_and_name_in_paths() -> None:
    """Where texts are numbers too, what may be either is refused."""
    g = graph("clt")
    N, K = g.edge_RN.shape[1], g.n_targets
    texts = ("95", "1", "0", *(str(200 + k) for k in range(3, K)))
    g = dataclasses.replace(g, meta=dataclasses.replace(g.meta, target_tokens=texts))
    for name in ("95", " 95", "target 0", 'output "95"', f"id:{g.target_token_K[0]}"):
        assert find_node(g, name) == N
    for k in range(K):
        assert find_node(g, node_name(g, N + k)) == N + k
    assert find_node(g, "1") == N + 1  # both ways the same
    assert find_node(g, "3") == N + 3
    with pytest.raises(InputError, match=r"several targets, write 'target K'"):
        find_node(g, "0")
    with pytest.raises(InputError, match='no node "id:99999"'):
        find_node(g, "id:99999")
    # paths name targets that are no next tokens with their places
    elsewhere = g.target_pos_K.copy()
    elsewhere[2] -= 1
    same = dataclasses.replace(g.meta, target_tokens=("95", "1", "95", *texts[3:]))
    g = dataclasses.replace(g, meta=same, target_pos_K=elsewhere)
    for k in (0, 2):
        name = node_name(g, N + k)
        if k == 0:
            name += f"@{g.target_pos_K[0]}"
        assert find_node(g, name) == N + k


def test_paths_between_any_node_and_the_targets() -> None:
    """By the same names."""
    g = graph("clt")
    source, target = strongest_names(g)
    assert strongest_paths(g, start=source, k=3) == strongest_paths(
        g, start=find_column(g, source), k=3
    )
    for node in ("error 1:2", "embed 0", source):
        paths = strongest_paths(g, start=node, k=2)
        assert paths
        assert all(path.nodes[0] == find_column(g, node) for path in paths)
        assert describe_paths(g, paths).count("\n") == len(paths) - 1
    paths = strongest_paths(g, start=source, end=target, k=1)
    assert paths[0].nodes[-1] == find_node(g, target)
    with pytest.raises(InputError, match="no node"):
        strongest_paths(g, start="nowhere")


# -- graph.json ------------------------------------------------------------------------


def test_links_say_how_they_travelled() -> None:
    g = graph("half")
    doc = graph_json(g, slug="g")
    validate(doc)
    n_heads = 0
    for link in doc["links"]:
        parts = edge_parts(g, link["source"], link["target"])
        both = link.get("direct", 0.0), link.get("attention", 0.0)
        want = parts.direct or 0.0, parts.attention or 0.0
        np.testing.assert_allclose(both, want, rtol=1e-3, atol=1e-12)
        for (layer, head, load), ours in zip(
            link.get("heads", ()), parts.heads or (), strict=False
        ):
            n_heads += 1
            assert (layer, head) == ours[:2]
            assert load == pytest.approx(ours[2], rel=1e-3)
        assert bool(parts.heads) == ("heads" in link)
    assert n_heads > 40
    bad = {**doc["links"][0], "direct": "much"}
    with pytest.raises(InputError, match=r"links\[0\]\.direct"):
        validate({**doc, "links": [bad]})


def test_only_the_strongest_links_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxclt.viewer.links._MAX_TRAVELS", 10)
    links = graph_json(graph("clt"), slug="g")["links"]
    assert ["attention" in link or "direct" in link for link in links] == (
        [True] * 10 + [False] * (len(links) - 10)
    )
    assert all("heads" not in link for link in links[10:])


def test_heads_are_listed_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct parts always are."""
    t = case("clt")
    monkeypatch.setattr(heads, "_fill", lambda *args: 1 / 0)
    g = t.graph(AttributeConfig(max_features=3))
    assert g.heads is None
    assert g.direct_RN is not None
