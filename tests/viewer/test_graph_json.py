"""graph.json: the shared schema, and that it says what the graph says."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import time

import numpy as np
import pytest

from jaxclt.errors import InputError
from jaxclt.files.json_text import finite
from jaxclt.graph.graph import VIRTUAL_TOKEN, Graph, GraphMeta, Pruning
from jaxclt.graph.nodes import find_node
from jaxclt.viewer.graph_json import graph_json, validate

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    '"quoted" (p=9)',
    "new\nline\t\r\u2028",
    "\ud800 lone",
    "<!--<script>",
    "&lt;",
)


def noise(*shape: int, seed: float = 1.0) -> np.ndarray:
    """Uniform on [0, 1), the same on every machine."""
    i = np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.float64)
    return np.modf(np.abs(np.sin(i * 12.9898 * seed) * 43758.5453))[0].reshape(shape)


def make_graph(
    *,
    n_layers: int = 3,
    n_features: int = 40,
    tokens: tuple[str, ...] = ("<bos>", "The", " cat", " sat"),
    targets: tuple[str, ...] = (" on", " down"),
    target_token: tuple[int, ...] | None = None,
    n_links: int = 200,
) -> Graph:
    """A graph with causal links; about ``n_links`` of them kept."""
    T, A, K, L = len(tokens), n_features, len(targets), n_layers
    N, R = A + L * T + T, A + K
    layer = np.sort((noise(A) ** 1.3 * L).astype(np.int32))
    pos = (noise(A, seed=2.0) ** 0.6 * T).astype(np.int32)
    order = np.lexsort((np.arange(A), pos, layer))
    layer, pos = layer[order], pos[order]
    source_layer = np.concatenate([layer, np.repeat(np.arange(L), T), np.full(T, -1)])
    source_pos = np.concatenate([pos, np.tile(np.arange(T), L), np.arange(T)])
    row_layer = np.concatenate([layer, np.full(K, L)])
    row_pos = np.concatenate([pos, np.full(K, T - 1)])
    allowed = source_layer[None] < row_layer[:, None]
    allowed &= source_pos[None] <= row_pos[:, None]
    size = np.exp(3.0 * (noise(R, N, seed=3.0) - 0.5)) ** 2 * allowed
    sign = np.where(noise(R, N, seed=5.0) < 0.7, 1, -1)
    edge = (size * sign).astype(np.float32)
    influence = noise(N, seed=7.0).astype(np.float32) ** 6
    keep = np.zeros((R, N), bool)
    ranked = np.argsort(-(size * (0.2 + noise(R, N, seed=11.0))), axis=None)
    keep.flat[ranked[: min(n_links, int(allowed.sum()))]] = True
    keep_N = keep.any(0)
    keep_N[:A] |= keep[:A].any(1)
    keep_N[A + L * T :] = True
    prob = np.sort(noise(K, seed=13.0))[::-1] ** 2
    return Graph(
        meta=GraphMeta(
            model="org/tiny model",
            dictionary="tiny-clt",
            prompt="".join(tokens[1:]),
            tokens=tokens,
            target_tokens=targets,
            n_layers=L,
            version="0.1.0",
        ),
        token_T=np.arange(10, 10 + T, dtype=np.int32),
        layer_A=layer,
        pos_A=pos,
        feature_A=np.arange(A, dtype=np.int32) * 37,
        value_A=(noise(A, seed=17.0) * 5).astype(np.float32),
        preact_A=(noise(A, seed=17.0) * 5).astype(np.float32),
        attributed_R=np.ones(R, bool),
        target_token_K=np.array(target_token or range(500, 500 + K), np.int32),
        target_prob_K=(prob / (prob.sum() + 0.2)).astype(np.float32),
        edge_RN=edge,
        bias_R=np.full(R, 0.1, np.float32),
        rest_R=np.zeros(R, np.float32),
        rest_abs_R=np.zeros(R, np.float32),
        readout_R=edge.sum(1) + np.float32(0.1),
        influence_N=influence,
        pruning=Pruning(
            keep_N=keep_N, keep_edge_RN=keep, node_threshold=0.8, edge_threshold=0.98
        ),
    )


@pytest.fixture(scope="module")
def graph() -> Graph:
    return make_graph()


@pytest.fixture
def doc(graph: Graph) -> dict:
    return graph_json(graph, slug="cat")


def test_document_satisfies_the_schema_and_survives_json(doc):
    validate(doc)
    assert json.loads(json.dumps(doc, allow_nan=False)) == doc


def test_ids_are_unique_and_fields_follow_circuit_tracer(graph, doc):
    by_id = {n["node_id"]: n for n in doc["nodes"]}
    assert len(by_id) == len(doc["nodes"])
    i = int(np.flatnonzero(graph.pruning.keep_N[: graph.n_features])[0])
    layer, pos, f = graph.layer_A[i], graph.pos_A[i], graph.feature_A[i]
    node = by_id[f"{layer}_{f}_{pos}"]
    assert node["jsNodeId"] == f"{layer}_{f}-0"
    assert node["feature"] == (layer + f) * (layer + f + 1) // 2 + f
    assert node["activation"] == pytest.approx(float(graph.value_A[i]), rel=1e-6)
    logit = by_id[f"{graph.n_layers + 1}_500_{graph.n_tokens - 1}"]
    assert logit["is_target_logit"]
    assert logit["influence"] is None
    assert logit["clerp"] == f'Output " on" (p={graph.target_prob_K[0]:.3f})'
    assert by_id["E_12_2"]["layer"] == "E"
    errors = [n for n in doc["nodes"] if n["feature"] == -1]
    assert errors
    for n in errors:
        assert n["node_id"] == f"{n['layer']}_-1_{n['ctx_idx']}"


def test_links_are_the_kept_edges_with_their_weights(graph, doc):
    def source(n: int) -> str:
        A, T = graph.n_features, graph.n_tokens
        if n < A:
            return f"{graph.layer_A[n]}_{graph.feature_A[n]}_{graph.pos_A[n]}"
        if n < graph.embed_cols.start:
            return "{}_-1_{}".format(*divmod(n - A, T))
        pos = n - graph.embed_cols.start
        return f"E_{graph.token_T[pos]}_{pos}"

    def target(r: int) -> str:
        if r < graph.n_features:
            return source(r)
        k = r - graph.n_features
        return f"{graph.n_layers + 1}_{graph.target_token_K[k]}_{graph.n_tokens - 1}"

    expected = {
        (source(n), target(r)): graph.edge_RN[r, n]
        for r, n in np.argwhere(graph.pruning.keep_edge_RN)
    }
    found = {(e["source"], e["target"]): np.float32(e["weight"]) for e in doc["links"]}
    assert found == expected
    assert len(doc["links"]) == len(expected)


def test_of_many_links_the_strongest_are_listed(graph, doc, monkeypatch):
    n_links = len(doc["links"])
    assert doc["jaxclt"]["kept_links"] == {
        "kept": n_links,
        "listed": n_links,
        "share": 1.0,
    }
    monkeypatch.setattr("jaxclt.viewer.links.MAX_LINKS", 5)
    few = graph_json(graph, slug="few")
    assert few["links"] == doc["links"][:5]
    assert [n["node_id"] for n in few["nodes"]] == [n["node_id"] for n in doc["nodes"]]
    said = few["jaxclt"]["kept_links"]
    assert (said["kept"], said["listed"]) == (n_links, 5)
    total_R = np.abs(graph.edge_RN).sum(1) + np.abs(graph.bias_R) + graph.rest_abs_R
    row_R = np.r_[graph.influence_N[: graph.n_features], graph.target_prob_K]
    passed_RN = np.abs(graph.edge_RN) * (row_R / total_R)[:, None]
    passed = np.sort(passed_RN[graph.pruning.keep_edge_RN])[::-1]
    assert said["share"] == pytest.approx(passed[:5].sum() / passed.sum(), abs=1e-3)


def test_nodes_without_links_go_but_tokens_and_outputs_stay(graph):
    none = dataclasses.replace(
        graph.pruning, keep_edge_RN=np.zeros_like(graph.pruning.keep_edge_RN)
    )
    doc = graph_json(dataclasses.replace(graph, pruning=none), slug="x")
    validate(doc)
    kinds = [n["feature_type"] for n in doc["nodes"]]
    assert kinds == ["embedding"] * graph.n_tokens + ["logit"] * graph.n_targets


def test_influence_is_the_cumulative_share_over_all_nodes(graph, doc):
    share = graph.influence_N.astype(np.float64) / graph.influence_N.sum(dtype=float)
    by_id = {n["node_id"]: n for n in doc["nodes"]}
    rows = [
        (share[i], by_id[node_id]["influence"])
        for i in range(graph.n_features)
        for node_id in [f"{graph.layer_A[i]}_{graph.feature_A[i]}_{graph.pos_A[i]}"]
        if node_id in by_id
    ]
    rows.sort(reverse=True)
    cumulative = [c for _, c in rows]
    assert cumulative == sorted(cumulative)
    for own, c in rows:
        assert c == pytest.approx(share[share >= own].sum(), abs=1e-6)


def test_no_influence_at_all_is_still_a_document(graph):
    zero = dataclasses.replace(graph, influence_N=np.zeros_like(graph.influence_N))
    validate(graph_json(zero, slug="x"))


def test_custom_targets_get_distinct_ids_no_vocabulary_has():
    graph = make_graph(targets=("a − b", "a − b"), target_token=(-1, -1))
    graph = dataclasses.replace(graph, target_prob_K=np.array([np.nan, 0.5]))
    doc = graph_json(graph, slug="x")
    validate(doc)
    logits = [n for n in doc["nodes"] if n["feature_type"] == "logit"]
    assert [n["feature"] for n in logits] == [VIRTUAL_TOKEN, VIRTUAL_TOKEN + 1]
    assert all("-" not in n["node_id"] for n in logits)


def test_what_json_has_no_word_for_is_refused(doc):
    doc["nodes"][0]["clerp"] = object()
    with pytest.raises(InputError, match="not a graph document"):
        validate(doc)


def test_hostile_tokens_leave_a_readable_document():
    doc = graph_json(make_graph(tokens=HOSTILE, targets=HOSTILE), slug="../../x y")
    validate(doc)
    json.dumps(doc, ensure_ascii=False).encode()
    assert doc["metadata"]["prompt_tokens"][0] == HOSTILE[0]
    for node in doc["nodes"][-len(HOSTILE) :]:
        head, _, p = node["clerp"].partition("(p=")
        assert float(p.rstrip(")")) >= 0
        assert head.count('"') == 2
    for key in ("slug", "scan"):
        assert re.fullmatch(r"[a-zA-Z0-9_.-]+", doc["metadata"][key])


def test_abs_input_is_what_a_row_reads_without_sign(graph, doc):
    total = np.abs(graph.edge_RN).sum(1) + np.abs(graph.bias_R)
    logits = [n["abs_input"] for n in doc["nodes"] if n["feature_type"] == "logit"]
    assert logits == pytest.approx(total[graph.target_rows].tolist(), rel=1e-5)


def test_scores_are_kept_and_made_finite(graph):
    scores = {"full": {"replacement": np.float32(0.5), "completeness": float("nan")}}
    doc = graph_json(graph, slug="x", scores=scores)
    validate(doc)
    assert doc["jaxclt"]["scores"] == {
        "full": {"replacement": 0.5, "completeness": None}
    }
    assert finite((np.inf, np.arange(2), True, None)) == [None, [0, 1], True, None]


def test_non_finite_graph_is_refused(graph):
    edge = np.full_like(graph.edge_RN, np.nan)
    with pytest.raises(InputError, match="edge_RN holds NaN"):
        graph_json(dataclasses.replace(graph, edge_RN=edge), slug="x")


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("nodes", 3, "layer"), 1.5, "$.nodes[3].layer"),
        (("nodes", 3, "ctx_idx"), -1, "$.nodes[3].ctx_idx"),
        (("nodes", 3, "influence"), float("nan"), "$.nodes[3].influence"),
        (("nodes", -1, "clerp"), "no probability", "clerp"),
        (("links", 2, "source"), "9_9_9", "$.links[2].source"),
        (("links", 2, "target"), None, "$.links[2].target"),
        (("links", 2, "weight"), float("inf"), "$.links[2].weight"),
        (("links", 2, "weight"), True, "$.links[2].weight"),
        (("links", 2), [], "$.links[2]"),
        (("links",), {}, "$.links"),
        (("metadata", "slug"), "a b", "$.metadata.slug"),
        (("metadata",), None, "$.metadata"),
    ],
)
def test_validate_names_the_offending_value(doc, path, value, where):
    bad = copy.deepcopy(doc)
    at = bad
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(InputError, match=re.escape(where)):
        validate(bad)


def test_validate_refuses_repeated_ids_and_missing_parts(doc):
    doc["nodes"][1]["node_id"] = doc["nodes"][0]["node_id"]
    with pytest.raises(InputError, match=r"nodes\[1\]\.node_id.*twice"):
        validate(doc)
    for wrong in (None, [], {}, {"nodes": []}):
        with pytest.raises(InputError):
            validate(wrong)


def test_fifty_thousand_links_are_validated_in_seconds():
    doc = graph_json(make_graph(n_features=600, n_links=50_000), slug="x")
    assert len(doc["links"]) == 50_000
    start = time.perf_counter()
    validate(doc)
    assert time.perf_counter() - start < 5


def test_a_target_that_is_no_next_token_is_an_output_that_says_so() -> None:
    """A feature's pre-activation, and one token twice: node ids stay apart."""
    graph = make_graph(targets=("L1 feature 9", " on", " on"), target_token=(-1, 7, 7))
    graph = dataclasses.replace(
        graph,
        target_layer_K=np.array([1, 3, 3], np.int32),
        target_pos_K=np.array([2, 3, 3], np.int32),
    )
    doc = graph_json(graph, slug="cat")
    validate(doc)
    feature, *tokens = (n for n in doc["nodes"] if n["feature_type"] == "logit")
    assert feature["node_id"] == f"4_{VIRTUAL_TOKEN}_2"
    assert (feature["layer"], feature["ctx_idx"]) == ("4", 2)
    assert feature["target"] == {
        "layer": 1,
        "token": False,
        "readout": pytest.approx(graph.readout_R[graph.n_features], rel=1e-6),
    }
    assert [n["node_id"] for n in tokens] == ["4_7_3", f"4_{VIRTUAL_TOKEN + 2}_3"]
    ids, N = [n["node_id"] for n in (feature, *tokens)], graph.edge_RN.shape[1]
    assert [find_node(graph, i) for i in ids] == [N, N + 1, N + 2]
    assert not any("target" in n for n in tokens)
    chosen = dataclasses.replace(graph.meta, weights="chosen")
    doc = graph_json(dataclasses.replace(graph, meta=chosen), slug="cat")
    assert sum("target" in n for n in doc["nodes"]) == 3
