"""Nodes of a graph by the names a user can read off the page, the JSON or a path.

| node | short | in graph.json | in paths |
|---|---|---|---|
| feature | ``12:5:345`` (layer:pos:feature) | ``12_345_5`` | ``L12 feature 345@5`` |
| error | ``error 12:5`` | ``12_-1_5`` | ``L12 error@5`` |
| token | ``embed 2`` | ``E_504_2`` | ``token " the"@2`` |
| target | ``target 0``, ``0`` or its text | ``31_7042_8`` | ``output " Paris"`` |

A target that is a token is found by ``id:7042`` too. Nodes are numbered as the graph's
columns; target k is number N + k, after the last.
"""

from __future__ import annotations

import re

import numpy as np

from jaxclt.errors import InputError, did_you_mean, on_one_line
from jaxclt.files.json_text import to_json
from jaxclt.graph.graph import Graph

__all__ = ["find_column", "find_node", "find_row", "quoted"]

_FORMS = {
    "feature": r"(?P<layer>\d{1,9}):(?P<pos>\d{1,9}):(?P<feature>\d{1,9})"
    r"|L(?P<layer2>\d{1,9}) feature (?P<feature2>\d{1,9})@(?P<pos2>\d{1,9})",
    "error": r"error (?P<layer>\d{1,9}):(?P<pos>\d{1,9})"
    r"|L(?P<layer2>\d{1,9}) error@(?P<pos2>\d{1,9})",
    "token": r'(?:embed|token) (?P<pos>\d{1,9})|token ".*"@(?P<pos2>\d{1,9})',
    "target": r"target (?P<target>\d{1,9})",
    "json": r"(?P<layer>E|\d{1,9})_(?P<feature>-?\d{1,9})_(?P<pos>\d{1,9})",
}


def find_node(graph: Graph, name: str) -> int:
    """Number of a node: its column, or N + k for target k.

    Raises:
      InputError: if there is no such node, or several targets have that name.
    """
    text = name.strip()
    for kind, form in _FORMS.items():
        match = re.fullmatch(form, text, re.DOTALL)
        if match:
            part = {
                k.rstrip("2"): v for k, v in match.groupdict().items() if v is not None
            }
            return _find(graph, name, kind, part)
    return graph.embed_cols.stop + _target_by_name(graph, name)


def find_column(graph: Graph, name: str) -> int:
    """Column of a node that can be a source; InputError for targets too."""
    node = find_node(graph, name)
    if node >= graph.embed_cols.stop:
        raise InputError(
            f"{quoted(name)} is a target of the graph: nothing starts there, give a "
            "feature, an error or a token as the source"
        )
    return node


def find_row(graph: Graph, name: str) -> int:
    """Row of a node that has inputs; InputError for errors and tokens too."""
    node = find_node(graph, name)
    if node < graph.n_features:
        return node
    if node < graph.embed_cols.stop:
        raise InputError(
            f"{quoted(name)} is an input of the graph: nothing leads there, give a "
            "feature or a target"
        )
    return graph.n_features + node - graph.embed_cols.stop


def quoted(token: str) -> str:
    """A text in quotes on one line; nothing in it can steer a terminal."""
    return on_one_line(to_json(token, ensure_ascii=False))


def _find(graph: Graph, name: str, kind: str, part: dict[str, str]) -> int:
    L, T, N = graph.n_layers, graph.n_tokens, graph.embed_cols.stop
    if kind == "json":
        kind, part = _json_kind(graph, part)
    at = {key: int(value) for key, value in part.items() if value != "E"}
    if kind == "target" and at["target"] < graph.n_targets:
        return N + at["target"]
    if kind == "vocabulary" and at["layer"] == L + 1:
        same_K = graph.target_id_K == at["feature"]
        found = np.flatnonzero(same_K & (graph.target_pos_K == at["pos"]))
        if len(found):
            return N + int(found[0])
    if "pos" in at and at["pos"] < T:
        if kind == "token":
            return graph.embed_cols.start + at["pos"]
        if kind == "error" and at["layer"] < L:
            return graph.error_cols.start + at["layer"] * T + at["pos"]
        if kind == "feature" and at["layer"] < L:
            here = (graph.layer_A == at["layer"]) & (graph.pos_A == at["pos"])
            found = np.flatnonzero(here & (graph.feature_A == at["feature"]))
            if len(found):
                return int(found[0])
    raise InputError(f"no node {quoted(name)} in this graph: {_hint(graph, kind)}")


def _json_kind(graph: Graph, part: dict[str, str]) -> tuple[str, dict[str, str]]:
    """What kind of node an id of graph.json names."""
    if part["layer"] == "E":
        return "token", {"pos": part["pos"]}
    if part["feature"].startswith("-"):
        return "error", part
    if int(part["layer"]) > graph.n_layers:
        return "vocabulary", part
    return "feature", part


def _hint(graph: Graph, kind: str) -> str:
    L, T = graph.n_layers, graph.n_tokens
    if kind == "feature":
        kept = graph.pruning.keep_N[graph.feature_cols]
        why = "it was not active there, or not selected"
        if kept.all() and graph.pruning.node_threshold < 1:
            why = "not active there, or pruned from this file (trace with --save full)"
        return f"{why}; features are layer:position:feature"
    if kind in ("target", "vocabulary"):
        return _targets(graph)
    return f"layers are 0..{L - 1}, positions 0..{T - 1}"


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
    raise InputError(
        f"no node {quoted(name)} in this graph: write layer:position:feature, "
        f"'error layer:position', 'embed position', or a target; {_targets(graph)}"
        f"{did_you_mean(name, tokens)}"
    )
