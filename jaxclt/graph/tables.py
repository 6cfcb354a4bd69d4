"""A graph as tables of nodes and edges, and as other libraries have it.

What is shown: the nodes and edges that pruning keeps, tokens and targets always. Names
are those of graph.json. Text of tokens and labels is untrusted.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxclt.errors import InputError
from jaxclt.files.atomic import atomic_path
from jaxclt.graph.nodes import facts, node_id, node_name

if TYPE_CHECKING:
    from jaxclt.graph.graph import Graph

__all__ = ["edge_table", "node_table", "save_graphml", "to_networkx"]


def node_table(graph: Graph) -> Any:
    """Nodes: ``id, kind, layer, pos, name, label, activation, influence``.

    Returns:
      A pandas DataFrame where pandas is installed, else a list of dicts.
    """
    return _table(_nodes(graph))


def edge_table(graph: Graph) -> Any:
    """Edges: ``source, target, weight``, by ids; see `node_table`."""
    return _table(_edges(graph))


def to_networkx(graph: Graph) -> Any:
    """A `networkx.DiGraph` of what is shown, nodes by their ids, with all columns.

    Raises:
      InputError: if networkx is not installed.
    """
    if importlib.util.find_spec("networkx") is None:
        raise InputError("networkx is not installed: pip install networkx")
    import networkx

    made = networkx.DiGraph(model=graph.meta.model, prompt=graph.meta.prompt)
    made.add_nodes_from((node["id"], node) for node in _nodes(graph))
    made.add_edges_from(
        (edge["source"], edge["target"], {"weight": edge["weight"]})
        for edge in _edges(graph)
    )
    return made


def save_graphml(path: str | os.PathLike[str], graph: Graph) -> None:
    """Write what is shown as GraphML, for Gephi, Cytoscape and igraph.

    Characters that XML cannot hold are written as U+FFFD.

    Raises:
      InputError: if networkx is not installed, or the file cannot be written.
    """
    made = to_networkx(graph)
    import networkx

    for holder in (made.graph, *(data for _, data in made.nodes(data=True))):
        for key, value in list(holder.items()):
            if value is None:
                del holder[key]
            elif isinstance(value, str):
                holder[key] = "".join(c if _xml(c) else "\ufffd" for c in value)
    with atomic_path(Path(path)) as temporary:
        networkx.write_graphml(made, temporary)


def _xml(c: str) -> bool:
    """Whether XML 1.0 may hold a character."""
    return (
        c in "\t\n\r"
        or "\x20" <= c <= "\ud7ff"
        or "\ue000" <= c <= "\ufffd"
        or (c >= "\U00010000")
    )


def _table(records: list[dict[str, Any]]) -> Any:
    if importlib.util.find_spec("pandas") is None:
        return records
    import pandas

    return pandas.DataFrame.from_records(records)


def _nodes(graph: Graph) -> list[dict[str, Any]]:
    N = graph.layout.n_columns
    shown = graph.pruning.keep_N | graph.layout.ends("input")
    listed = [*np.flatnonzero(shown).tolist(), *range(N, N + graph.n_targets)]
    return [_node(graph, node) for node in listed]


def _node(graph: Graph, node: int) -> dict[str, Any]:
    kind, at = graph.layout.kind(node), facts(graph, node)
    is_feature, is_source = kind == "feature", node < graph.layout.n_columns
    return {
        "id": node_id(graph, node),
        "kind": kind,
        "layer": at["layer"],
        "pos": at["pos"],
        "name": node_name(graph, node),
        "label": at["text"],
        "activation": float(graph.value_A[node]) if is_feature else None,
        "influence": float(graph.influence_N[node]) if is_source else None,
    }


def _edges(graph: Graph) -> list[dict[str, Any]]:
    row_E, col_E = np.nonzero(graph.pruning.keep_edge_RN)
    weight_E = graph.edge_RN[row_E, col_E].astype(float).tolist()
    target_E = graph.layout.node_of(row_E).tolist()
    ids = {node: node_id(graph, node) for node in {*target_E, *col_E.tolist()}}
    return [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(
            col_E.tolist(), target_E, weight_E, strict=True
        )
    ]
