"""Cells in words: names of nodes, and the sentence that says why a head attends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxclt.errors import on_one_line
from jaxclt.graph import nodes
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import facts, node_name, quoted

if TYPE_CHECKING:
    from jaxclt.attending.apart import Apart, Pair
    from jaxclt.attending.cells import Cell

__all__ = ["because", "node_id", "place_name", "side_name"]

_MORE = ("bias", "rest")  # after the columns, see `jaxclt.attending.brought`


def node_id(graph: Graph, node: int) -> str:
    """A node's id in graph.json, or what stands for biases and the rest."""
    if node >= graph.layout.n_columns:
        return _MORE[node - graph.layout.n_columns]
    return nodes.node_id(graph, node)


def side_name(graph: Graph, node: int) -> str:
    """What a node is called: a feature by its label, if it has one."""
    if node >= graph.layout.n_columns:
        return _MORE[node - graph.layout.n_columns]
    at = facts(graph, node)
    if graph.layout.kind(node) == "feature" and at["text"]:
        return f"L{at['layer']} {on_one_line(at['text'])} @{at['pos']}"
    return node_name(graph, node)


def place_name(tokens: Sequence[str], cell: Cell) -> str:
    """A cell by its head and its tokens, on one line."""
    at, to = (f"{quoted(tokens[pos])}@{pos}" for pos in (cell.query, cell.key))
    return f"L{cell.layer}H{cell.head} at {at} attends to {to}"


def because(graph: Graph, apart: Apart, pairs: list[Pair]) -> str:
    """Why a head attends: the pair that most makes this key win against the others."""
    text = place_name(graph.meta.tokens, apart.cell)
    for pair in pairs:
        if pair.competition > 0:
            query, key = (side_name(graph, node) for node in (pair.query, pair.key))
            return f"{text} because [{query}] x [{key}]"
    return text
