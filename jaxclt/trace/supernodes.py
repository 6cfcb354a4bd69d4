"""Supernodes that a reader saved: a file of groups, or a graph.json that has some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError, shown
from jaxclt.files.json_file import (
    MOST_DATA,
    check_json,
    json_schema,
    parse_json,
    read_bounded,
)
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import find_node
from jaxclt.types import Supernode

__all__ = ["read_supernodes"]

FORM = '[["name", "layer_feature_pos", ...], ...]'
_TEXTS = {"type": "array", "minItems": 1, "items": {"type": ["string", "number"]}}
_GROUPS = json_schema({"type": "array", "items": _TEXTS})


def read_supernodes(path: Path, graph: Graph) -> list[Supernode]:
    """Groups with all their members.

    Args:
      path: JSON of lists of a name and members, or a graph.json whose ``qParams`` has
        them (also as text, as other viewers save it). Members are ids as in graph.json
        or names (`jaxclt.graph.nodes`).
      graph: whose nodes they are. Features need not be among its nodes: they can still
        be set to a value.

    Raises:
      InputError: if the file holds no groups, or a member is not a node of the graph.
    """
    raw = parse_json(read_bounded(path, MOST_DATA), path)
    if isinstance(raw, dict):
        view = raw.get("qParams")
        raw = (view.get("supernodes") if isinstance(view, dict) else None) or []
        raw = parse_json(raw, path) if isinstance(raw, str) else raw
    check_json(raw, _GROUPS, f"{path} holds no supernodes, write {FORM}")
    groups = [(str(name), [str(m) for m in members]) for name, *members in raw]
    return [
        Supernode(name, tuple(_member(path, graph, name, m) for m in members))
        for name, members in groups
        if members
    ]


def _member(path: Path, graph: Graph, name: str, member: str) -> Any:
    match = re.fullmatch(r"(\d{1,9})_(\d{1,9})_(\d{1,9})", member)
    if match is not None:
        layer, feature, pos = map(int, match.groups())
        if layer < graph.n_layers:
            return layer, pos, feature
    try:
        find_node(graph, member)
    except InputError as error:
        raise InputError(f"{path}: supernode {shown(name)}: {error}") from error
    return member
