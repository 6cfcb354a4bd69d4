"""A pruned graph in the JSON that circuit-tracer and Neuronpedia read.

`graph_json` turns the kept part of a `Graph` into ``{metadata, qParams, nodes,
links}`` and `validate` checks such a document, ours or another tool's, before it is
written or shown. What the schema has no place for (scores, certificate, the
dictionary's name) lies under the top-level key ``jaxclt``, which other readers skip.

The schema knows one kind of thing to explain, an output token. Every other target is
written as one, as circuit-tracer does with custom directions: an output node in the
column of its position, with a number above the vocabulary, its label for the token and
its weight for the probability, so that other viewers draw it and score the same graph.
Our own extra key ``target`` says what it is.

Identities the tests check: the links are ``graph.pruning.keep_edge_RN``, or of very
many the strongest (`jaxclt.viewer.links.MAX_LINKS`), with the weights of
``graph.edge_RN`` (those of the reading by response beside them, marked, where the graph
has it); a node's ``influence`` is the share of all influence held by it and every more
influential node.
"""

from __future__ import annotations

import functools
import json
import math
import re
from importlib import resources
from typing import Any

import numpy as np

from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import TEXT, Schema, check_json, json_schema
from jaxclt.files.json_text import finite, well_formed
from jaxclt.graph.graph import Graph
from jaxclt.graph.kinds import KINDS
from jaxclt.graph.nodes import facts
from jaxclt.graph.shares import shares_total, whole_input
from jaxclt.viewer.links import brief, edges_of, kept_edges, link_list

__all__ = ["graph_json", "validate"]

_WRONG = "not a graph document"
_NUMBERS = {int, float}
_LARGEST = float(np.finfo(np.float64).max)


def graph_json(
    graph: Graph,
    *,
    slug: str,
    scores: dict[str, Any] | None = None,
    other: Graph | None = None,
) -> dict[str, Any]:
    """State the kept nodes and links of ``graph`` in the shared schema.

    Features and errors without a kept link are dropped; embeddings and logits always
    stay. Links come strongest first (see `jaxclt.viewer.links.Kept`), at most
    `MAX_LINKS`; of a graph with edges by response also those that only these keep.
    Strings are well-formed and numbers finite: ``json.dumps(doc, allow_nan=False)`` and
    any encoding work.

    Args:
        graph: what to show; ``graph.pruning`` says which part.
        slug: name of the graph; characters outside ``[a-zA-Z0-9_.-]`` become ``-``.
        scores: scores, certificate or a whole report, kept under ``jaxclt.scores``.
        other: the graph by response, if it is at hand; made where it is wanted.

    Raises:
        InputError: a kept weight, an activation or an influence is not finite.
    """
    readings = _readings(graph, other)
    kept = kept_edges(readings)
    row_E, col_E = kept.listed()
    for reading in readings.values():
        _require_finite(edge_RN=edges_of(reading, kept.row_E, kept.col_E))
    _require_finite(
        value_A=graph.value_A,
        influence_N=graph.influence_N,
        readout_R=graph.readout_R[graph.target_rows],
    )
    layout = graph.layout
    drawn = np.zeros(layout.nodes["target"].stop, bool)
    drawn[kept.col_E] = drawn[layout.node_of(kept.row_E)] = True
    for kind, at in layout.nodes.items():
        drawn[at] |= KINDS[kind].always_drawn
    influences = [*_influences(graph), *[{"influence": None}] * graph.n_targets]
    inputs = _inputs(graph)
    nodes = {
        i: _node(graph, i, inputs=inputs) | influences[i]
        for i in np.flatnonzero(drawn).tolist()
    }
    _add_changes(readings, nodes)
    ids = {i: node["node_id"] for i, node in nodes.items()}
    return {
        "metadata": _metadata(graph, slug),
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": link_list(readings, row_E, col_E, ids),
        "jaxclt": finite(
            {
                "model": well_formed(graph.meta.model),
                "dictionary": well_formed(graph.meta.dictionary),
                "convention": graph.meta.convention,
                "reading": graph.meta.reading,
                "version": graph.meta.version,
                "hashes": dict(graph.meta.hashes),
                "scores": scores,
                "kept_links": kept.said(),
                **({"messages": graph.meta.messages} if graph.meta.messages else {}),
            }
        ),
    }


def _readings(graph: Graph, other: Graph | None) -> dict[str, Graph]:
    """The graph by value, and by response if it has that."""
    if graph.response is None:
        return {"value": graph}
    # Here, for jax comes with it, which who only reads documents does without.
    from jaxclt.graph.response import by_response

    return {"value": graph, "response": other or by_response(graph)}


def _add_changes(readings: dict[str, Graph], nodes: dict[int, dict[str, Any]]) -> None:
    """Say of sources what a small change of them does, as far as the graph knows.

    Their share of influence by response; their derivative, what it does to the contrast
    in the real model; of features how much of it the graph's total effects by response
    do not show.
    """
    from jaxclt.graph.yardstick import contrast_derivative, hidden_effect  # as above

    graph, other = readings["value"], readings.get("response")
    known = {"derivative": contrast_derivative(graph), "hidden": hidden_effect(graph)}
    said = {k: [brief(x) for x in x_N] for k, x_N in known.items() if x_N is not None}
    if other is not None:
        for key in ("influence", "influence_share"):
            said[f"{key}_response"] = [said_of[key] for said_of in _influences(other)]
    for name, number_N in said.items():
        for i, node in nodes.items():
            if i < len(number_N):
                node[name] = number_N[i]
    if other is not None:
        total_R = _numbers(other, shares_total(other))
        for i, node in nodes.items():
            if "abs_input" in node:
                node["share_total_response"] = total_R[graph.layout.row_of(i)]


def validate(doc: Any, *, foreign: bool = False) -> None:
    """Check a graph document against ``graph.schema.json`` and what it cannot say.

    Beyond the schema: numbers are finite, node ids unique, links between listed nodes.

    Args:
        doc: parsed JSON.
        foreign: it may be another tool's, whose slugs and labels have forms of their
            own, and whose outputs and tokens are in any layer: a node's type says what
            it is. Nodes may share an id, as errors and features of layer 0 do in files
            of circuit-tracer up to 0.5.0; the page tells them apart.

    Raises:
        InputError: names the first offending value's path, as ``$.nodes[3].layer``.
    """
    check_json(doc, _schema(foreign), _WRONG)
    for part in ("nodes", "links"):
        for i, thing in enumerate(doc[part]):
            for key, value in thing.items():
                if type(value) in _NUMBERS and not abs(value) <= _LARGEST:
                    raise _bad(f"$.{part}[{i}].{key}", f"{shown(value)} is not finite")
    ids: set[str] = set()
    for i, node in enumerate(doc["nodes"]):
        if node["node_id"] in ids and not foreign:
            raise _bad(f"$.nodes[{i}].node_id", f"{shown(node['node_id'])} used twice")
        ids.add(node["node_id"])
    for i, link in enumerate(doc["links"]):
        for end in ("source", "target"):
            if link[end] not in ids:
                why = f"{shown(link[end])} is no node of the graph"
                raise _bad(f"$.links[{i}].{end}", why)


def _bad(path: str, message: str) -> InputError:
    return InputError(f"{_WRONG}: {path}: {message}")


@functools.cache
def _schema(foreign: bool) -> Schema:
    text = resources.files("jaxclt.viewer").joinpath("graph.schema.json").read_text()
    schema = json.loads(text)
    if foreign:
        parts = schema["$defs"]
        parts["name"] = TEXT
        node = parts["node"]
        # The layer counts where the type does not say it all.
        typed = {"enum": [KINDS[kind].drawn for kind in ("target", "embed")]}
        node |= {"if": {"properties": {"feature_type": typed}}, "then": {}}
        node["else"] = {"properties": {"layer": node["properties"].pop("layer")}}
        node["properties"]["layer"] = {"type": ["string", "integer"]}
        node["properties"]["token_prob"] = {"type": "number"}
    return json_schema(schema)


def _require_finite(**arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"the graph's {name} holds NaN or infinity; trace the prompt again in "
                "float32 and check the model's and the dictionary's weights"
            )


def _metadata(graph: Graph, slug: str) -> dict[str, Any]:
    meta, pruning = graph.meta, graph.pruning
    return {
        "slug": _name(slug),
        "scan": _name(meta.model),
        "prompt_tokens": [well_formed(token) for token in meta.tokens],
        "prompt": well_formed(meta.prompt),
        "transcoder_list": [well_formed(meta.dictionary)],
        "node_threshold": float(pruning.node_threshold),
        "schema_version": 1,
        "info": {"generator": {"name": "jaxclt", "version": meta.version}},
        "pruning_settings": {
            "node_threshold": float(pruning.node_threshold),
            "edge_threshold": float(pruning.edge_threshold),
        },
    }


def _node(
    graph: Graph, i: int, *, inputs: list[dict[str, float | None]]
) -> dict[str, Any]:
    """A node as circuit-tracer has it; ``abs_input`` and ``target`` are our own."""
    kind, at = graph.layout.kind(i), facts(graph, i)
    row = KINDS[kind]
    node: dict[str, Any] = {
        "token_prob": at.get("probability", 0.0),
        "is_target_logit": at.get("k") == 0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": well_formed(row.clerp.format_map(at)),
        "influence": None,
        "activation": None,
        "node_id": row.node_id.format_map(at),
        "jsNodeId": row.js_id.format_map(at),
        "feature": int(row.feature.format_map(at)),
        "layer": row.layer.format_map(at),
        "ctx_idx": at["pos"],
        "feature_type": row.drawn,
    }
    if kind == "feature":
        node["activation"] = float(str(np.float32(graph.value_A[i])))
        node |= _said(graph, i)
    if row.ends is None:
        node |= inputs[graph.layout.row_of(i)]
    k = at.get("k")
    if k is not None and (graph.meta.weights == "chosen" or not graph.is_next_token[k]):
        layer = int(graph.target_layer_K[k])
        node["target"] = {
            "layer": layer if layer < graph.n_layers else None,
            "token": bool(graph.target_token_K[k] >= 0),
            "readout": float(f"{graph.readout_R[graph.layout.row_of(i)]:.7g}"),
        }
    return node


def _said(graph: Graph, node: int) -> dict[str, Any]:
    """Where a feature node's label is from, what it writes and what it rests on."""
    layer, pos, feature = graph.feature(node)
    said = graph.meta.said.get(f"{layer}:{pos}:{feature}")
    if f"{layer}:{feature}" in graph.meta.labels:
        source = {"label_source": "dictionary"}
    else:
        source = {"label_source": "automatic"} if said and said["label"] else {}
    if said is None:
        return source
    both = {
        name: [[well_formed(text), z] for text, z in said[name]]
        for name in ("raises", "lowers")
    }
    reads = [[pos, well_formed(text), share] for pos, text, share in said["reads"]]
    return source | {"writes": both | {"share": said["share"]}, "reads": reads}


def _influences(graph: Graph) -> list[dict[str, float]]:
    """What each source holds of the influence, alone and with all above it."""
    with_all_N = _cumulative_influence(graph.influence_N).tolist()
    share_N = graph.influence_N / (graph.influence_N.sum() or 1.0)
    return [
        {"influence": sum_, "influence_share": brief(share)}
        for sum_, share in zip(with_all_N, share_N.tolist(), strict=True)
    ]


def _cumulative_influence(influence_N: np.ndarray) -> np.ndarray:
    """Share of all influence held by each node and those above it: low is important."""
    order_N = np.argsort(-influence_N, kind="stable")
    sorted_N = influence_N[order_N].astype(np.float64)
    share_N = np.ones(len(influence_N))
    if sorted_N.sum() > 0:
        share_N[order_N] = np.minimum(np.cumsum(sorted_N) / sorted_N.sum(), 1.0)
    return share_N.round(7)


def _inputs(graph: Graph) -> list[dict[str, float | None]]:
    """Everything a row reads, summed without sign; None where it was not computed.

    Also what its shares are of, where the graph's convention has them of less.
    """
    said = {"abs_input": _numbers(graph, whole_input(graph))}
    if graph.meta.convention != "paper":
        said["share_total"] = _numbers(graph, shares_total(graph))
    return [
        dict(zip(said, row, strict=True)) for row in zip(*said.values(), strict=True)
    ]


def _numbers(graph: Graph, total_R: np.ndarray) -> list[float | None]:
    return [
        float(f"{total:.7g}") if done and math.isfinite(total) else None
        for total, done in zip(
            total_R.tolist(), graph.attributed_R.tolist(), strict=True
        )
    ]


def _name(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", text).strip("-") or "graph"
