"""Nodes of a graph by the names a user can read off the page, the JSON or a path.

| node | short | in graph.json | in paths |
|---|---|---|---|
| feature | ``12:5:345`` (layer:pos:feature) | ``12_345_5`` | ``L12 feature 345@5`` |
| error | ``error 12:5`` | ``12_-1_5`` | ``L12 error@5`` |
| token | ``embed 2`` | ``E_504_2`` | ``token " the"@2`` |
| target | ``target 0``, ``0`` or its text | ``31_7042_8`` | ``output " Paris"`` |

A target that is a token is found by ``id:7042`` too. Nodes are numbered as in
`jaxclt.graph.layout`; their names are rows of `jaxclt.graph.kinds`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from string import Formatter
from typing import Any

import numpy as np

from jaxclt.errors import InputError, did_you_mean, on_one_line
from jaxclt.files.json_text import to_json
from jaxclt.graph.graph import Graph
from jaxclt.graph.kinds import KINDS

__all__ = [
    "facts",
    "find_column",
    "find_node",
    "find_row",
    "labelled",
    "node_id",
    "node_label",
    "node_name",
    "quoted",
    "short_name",
]


def facts(graph: Graph, node: int) -> dict[str, Any]:
    """What is known of a node, and what names of its kind are made of.

    ``layer`` (-1 before the first, above the last for a target), ``pos``, ``number``,
    ``text`` (what a feature, token or target is called), also ``quoted``; of a feature
    ``cantor``, layer and number paired in one integer; of a target ``k`` and what its
    label and its clerp say.
    """
    place = graph.layout.place(node)
    more: dict[str, Any] = {}
    if "A" in place:
        layer, pos, number = graph.feature(node)
        text = graph.meta.label(layer, pos, number)
        more["cantor"] = (layer + number) * (layer + number + 1) // 2 + number
    elif "K" in place:
        k = more["k"] = place["K"]
        layer, pos = graph.n_layers + 1, int(graph.target_pos_K[k])
        number, text = int(graph.target_id_K[k]), graph.meta.target_tokens[k]
        more["what"] = "output" if graph.target_token_K[k] >= 0 else "target"
        more["where"] = "" if graph.is_next_token[k] else f"@{pos}"
        probability = float(graph.target_prob_K[k])
        more["probability"] = probability if np.isfinite(probability) else 0.0
        # Readers cut the token at the first two quotes and the rest at "(p=".
        more["token"] = text.replace('"', "”").replace("(p=", "( p=")
    else:
        layer, pos = place.get("L", -1), place.get("T", 0)
        number, text = int(graph.token_T[pos]), graph.meta.tokens[pos]
    said = {"layer": layer, "pos": pos, "number": number, "text": text}
    return said | more | {"quoted": quoted(text)}


def node_name(graph: Graph, index: int) -> str:
    """What a node is called in text: a column of the graph, or N + k for target k.

    Raises:
      InputError: if there is no such node.
    """
    last = graph.layout.n_columns + graph.n_targets - 1
    if not 0 <= index <= last:
        raise InputError(f"node={index}: the graph has 0..{last}")
    return KINDS[graph.layout.kind(index)].label.format_map(facts(graph, index))


def node_label(graph: Graph, index: int) -> str:
    """What a feature node does, in words; empty where nothing is known."""
    return facts(graph, index)["text"] if index < graph.n_features else ""


def labelled(name: str, label: str) -> str:
    """A node's name and, in brackets, its label if it has one; fit for a terminal."""
    return f"{name} [{on_one_line(label)}]" if label else name


def short_name(graph: Graph, index: int) -> str:
    """The shortest name that finds a node again."""
    return KINDS[graph.layout.kind(index)].names[0].format_map(facts(graph, index))


def node_id(graph: Graph, index: int) -> str:
    """The id of a node in graph.json."""
    return KINDS[graph.layout.kind(index)].node_id.format_map(facts(graph, index))


def quoted(token: str) -> str:
    """A text in quotes on one line; nothing in it can steer a terminal."""
    return on_one_line(to_json(token, ensure_ascii=False))


def find_node(graph: Graph, name: str) -> int:
    """Number of a node: its column, or N + k for target k.

    Raises:
      InputError: if there is no such node, or several targets have that name.
    """
    like = None
    for kind, at in _read(graph, name.strip()):
        like, found = kind, _numbered(graph, kind, at)
        if found is not None:
            return found
    if like is not None:
        raise InputError(f"no node {quoted(name)} in this graph: {_hint(graph, like)}")
    return graph.layout.at("target", _target_by_name(graph, name))


def find_column(graph: Graph, name: str) -> int:
    """Column of a node that can be a source; InputError for targets too."""
    node = find_node(graph, name)
    if node >= graph.layout.n_columns:
        raise InputError(
            f"{quoted(name)} is a target of the graph: nothing starts there, give a "
            "feature, an error or a token as the source"
        )
    return node


def find_row(graph: Graph, name: str) -> int:
    """Row of a node that has inputs; InputError for errors and tokens too."""
    node = find_node(graph, name)
    if KINDS[graph.layout.kind(node)].ends is not None:
        raise InputError(
            f"{quoted(name)} is an input of the graph: nothing leads there, give a "
            "feature or a target"
        )
    return graph.layout.row_of(node)


def _read(graph: Graph, text: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Kinds of nodes that have names like this, and the numbers in it."""
    for kind in graph.layout.nodes:
        row = KINDS[kind]
        is_target = row.axes == "K"  # whose label is text, and not read here
        forms = [*row.names, row.node_id] + [row.label] * (not is_target)
        for match in (re.fullmatch(_pattern(form), text, re.DOTALL) for form in forms):
            if match is not None:
                at = {name: int(number) for name, number in match.groupdict().items()}
                if not is_target or at.get("layer", math.inf) > graph.n_layers:
                    yield kind, at


def _pattern(form: str) -> str:
    """What matches a name, with a group for each of its numbers."""
    parts = []
    for text, field, *_ in Formatter().parse(form):
        parts.append(re.escape(text))
        if field is not None:
            number = rf"(?P<{field}>\d{{1,9}})"
            parts.append('".*"' if field == "quoted" else number)
    return "".join(parts)


def _numbered(graph: Graph, kind: str, at: dict[str, int]) -> int | None:
    """The node of a kind that has these numbers, if there is one."""
    axes, shape = KINDS[kind].axes, graph.layout.shape(kind)
    if axes == "A":
        here_A = (graph.layer_A == at["layer"]) & (graph.pos_A == at["pos"])
        place = np.flatnonzero(here_A & (graph.feature_A == at["number"]))[:1].tolist()
    elif axes == "K" and "layer" in at:
        same_K = (graph.target_id_K == at["number"]) & (graph.target_pos_K == at["pos"])
        top = at["layer"] == graph.n_layers + 1
        place = np.flatnonzero(same_K & top)[:1].tolist()
    else:
        place = [at[{"L": "layer", "T": "pos", "K": "k"}[axis]] for axis in axes]
    if not place or any(i >= n for i, n in zip(place, shape, strict=True)):
        return None
    return graph.layout.at(kind, *place)


def _hint(graph: Graph, kind: str) -> str:
    axes = KINDS[kind].axes
    if axes == "K":
        return _targets(graph)
    if axes != "A":
        return f"layers are 0..{graph.n_layers - 1}, positions 0..{graph.n_tokens - 1}"
    why = "it was not active there, or not selected"
    kept = graph.pruning.keep_N[graph.feature_cols]
    if kept.all() and graph.pruning.node_threshold < 1:
        why = "not active there, or pruned from this file (trace with --save full)"
    return f"{why}; features are layer:position:feature"


def _targets(graph: Graph) -> str:
    names = [f"{k} {quoted(t)}" for k, t in enumerate(graph.meta.target_tokens)]
    return f"targets are {', '.join(names)}"


def _target_by_name(graph: Graph, name: str) -> int:
    """Target with this text, exactly or but for spaces around it, token or number."""
    text, tokens = name.strip(), list(graph.meta.target_tokens)
    in_path = r'(?:output|target) (".*")(?:@(\d{1,9}))?'
    if match := re.fullmatch(in_path, text, re.DOTALL):
        at_K = graph.target_pos_K.tolist()
        found = [
            k
            for k, token in enumerate(tokens)
            if quoted(token) == match[1] and int(match[2] or at_K[k]) == at_K[k]
        ]
    else:
        found = [k for k, token in enumerate(tokens) if token == name] or [
            k for k, token in enumerate(tokens) if token.strip() == text
        ]
    if not found and (match := re.fullmatch(r"id:(\d{1,9})", text)):
        found = np.flatnonzero(graph.target_token_K == int(match[1])).tolist()
    # A model of sums has tokens that read like numbers of targets.
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) < len(tokens):
        found = [*found, *({int(text)} - set(found))]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{quoted(name)} names several targets, write 'target K' with K from 0: "
            f"{_targets(graph)}"
        )
    said = {"layer": "layer", "pos": "position", "number": "feature"}
    forms = [KINDS[kind].names[0].format_map(said) for kind in graph.meta.sources]
    listed = ", ".join(f"'{form}'" if " " in form else form for form in forms)
    raise InputError(
        f"no node {quoted(name)} in this graph: write {listed}, or a target; "
        f"{_targets(graph)}{did_you_mean(name, tokens)}"
    )
