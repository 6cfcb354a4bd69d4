"""Supernodes that a reader saved: a file of groups, or a graph.json that has some."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jaxclt.errors import InputError, shown
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import find_node
from jaxclt.types import Supernode

__all__ = ["read_supernodes"]

FORM = '[["name", "layer_feature_pos", ...], ...]'


def read_supernodes(path: Path, graph: Graph) -> list[Supernode]:
    """Groups with all their members.

    Args:
      path: JSON of lists of a name and members, or a graph.json whose ``qParams`` has
        them (as text, too: other viewers save it so). Members are ids as in graph.json
        or names (`jaxclt.graph.nodes`).
      graph: whose nodes they are. Features need not be among them, to be set to a
        value for example.

    Raises:
      InputError: if the file holds no groups, or a member is no node of the graph.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(raw, dict):
            raw = (raw.get("qParams") or {}).get("supernodes") or []
            raw = json.loads(raw) if isinstance(raw, str) else raw
        groups = [(str(name), [str(m) for m in members]) for name, *members in raw]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no supernodes ({type(error).__name__}): write {FORM}"
        ) from error
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
