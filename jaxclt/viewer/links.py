"""The links of graph.json: kept edges, how they travelled and what a change does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import orjson

from jaxclt.graph.graph import Graph
from jaxclt.graph.shares import edge_influence

__all__ = ["MAX_LINKS", "Kept", "brief", "edges_of", "kept_edges", "link_list"]

MAX_LINKS = 50_000  # strongest, that graph.json lists; graph.npz has all kept edges
_MAX_TRAVELS = 10_000  # strongest links that say how they travelled, to bound the file
_MAX_HEADS = 3  # listed for a link
_PARTS = {"qk_query": "query", "qk_key": "key", "norm": "norm", "gate": "gate"}


class Kept(NamedTuple):
    """Edges that any reading of a graph keeps, strongest first.

    By the influence that passes them (`jaxclt.graph.shares.edge_influence`) in the
    reading in which it is more.
    """

    row_E: np.ndarray
    col_E: np.ndarray
    passed_E: np.ndarray

    def listed(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of those that graph.json lists."""
        return self.row_E[:MAX_LINKS], self.col_E[:MAX_LINKS]

    def said(self) -> dict[str, Any]:
        """How many there are, and what part of their influence is listed; as JSON."""
        total = self.passed_E.sum()
        share = float(self.passed_E[:MAX_LINKS].sum() / total) if total > 0 else 1.0
        n = len(self.row_E)
        return {"kept": n, "listed": min(n, MAX_LINKS), "share": round(share, 4)}


def kept_edges(readings: dict[str, Graph]) -> Kept:
    """Edges that any reading of a graph keeps."""
    graphs = list(readings.values())
    flat = [np.flatnonzero(g.pruning.keep_edge_RN) for g in graphs]
    kept = flat[0] if len(flat) == 1 else np.union1d(*flat)
    row_E, col_E = np.unravel_index(kept, graphs[0].edge_RN.shape)
    passed = [edge_influence(g, row_E, edges_of(g, row_E, col_E)) for g in graphs]
    passed_E = np.max(passed, axis=0)
    strongest = np.argsort(-passed_E, kind="stable")
    return Kept(*(x_E[strongest] for x_E in (row_E, col_E, passed_E)))


def edges_of(graph: Graph, row_E: np.ndarray, col_E: np.ndarray) -> np.ndarray:
    """Some edges as the file has them, [E] float32."""
    return graph.edge_RN[row_E, col_E].astype(np.float32)


def link_list(
    readings: dict[str, Graph],
    row_E: np.ndarray,
    col_E: np.ndarray,
    node_ids: dict[int, str],
) -> list[dict[str, Any]]:
    """Edges as links: their weights and what else the graph knows of them.

    Args:
      readings: of one graph, `value` and, where it has that, `response`.
      row_E: rows of the edges.
      col_E: their columns.
      node_ids: of the nodes at their ends.
    """
    graph = readings["value"]
    target_E = graph.layout.node_of(row_E)
    weights = _decimals(edges_of(graph, row_E, col_E))
    links: list[dict[str, Any]] = [
        {"source": node_ids[s], "target": node_ids[t], "weight": w}
        for s, t, w in zip(col_E.tolist(), target_E.tolist(), weights, strict=True)
    ]
    _add_travel(graph, links, row_E[:_MAX_TRAVELS], col_E[:_MAX_TRAVELS])
    if "response" in readings:
        _add_response(readings, links, row_E, col_E)
    return links


def _add_travel(
    graph: Graph, links: list[dict[str, Any]], row_E: np.ndarray, col_E: np.ndarray
) -> None:
    """Say of the strongest links how they travelled, as far as the graph knows.

    A link that has no ``direct`` part because it moves between positions has no such
    key: a viewer that reads the parts takes ``attention`` for the whole.
    """
    if graph.direct_RN is None or len(row_E) == 0:
        return
    direct_E = np.asarray(graph.direct_RN[row_E, col_E]).ravel()
    _add(links, direct=direct_E, attention=graph.edge_RN[row_E, col_E] - direct_E)
    if graph.heads is None:
        return
    at_E = graph.heads.find(row_E, col_E)
    for i in np.flatnonzero(at_E >= 0).tolist():
        listed = graph.heads.listed(int(at_E[i]))[:_MAX_HEADS]
        if listed:
            links[i]["heads"] = [[l, h, brief(load)] for l, h, load in listed]


def _add_response(
    readings: dict[str, Graph],
    links: list[dict[str, Any]],
    row_E: np.ndarray,
    col_E: np.ndarray,
) -> None:
    """Say of all links what they are by response, of what parts, and who keeps them."""
    response = _decimals(edges_of(readings["response"], row_E, col_E))
    for link, number in zip(links, response, strict=True):
        link["response"] = number
    found = readings["value"].response
    assert found is not None
    at_E = found.parts.find(row_E, col_E)  # -1, the 0 behind the last, where not listed
    for name, part in _PARTS.items():
        _add(links, **{name: np.append(getattr(found.parts, f"{part}_E"), 0)[at_E]})
    for reading, other in (("value", "response"), ("response", "value")):
        missing_E = ~readings[other].pruning.keep_edge_RN[row_E, col_E]
        for i in np.flatnonzero(missing_E).tolist():
            links[i]["reading"] = reading


def _add(links: list[dict[str, Any]], **parts: np.ndarray) -> None:
    """Numbers under their names, those that are not 0, to the first links."""
    for name, x_E in parts.items():
        for i in np.flatnonzero(x_E).tolist():
            links[i][name] = brief(x_E[i])


def brief(x: float) -> float:
    """Four digits: parts are read, not added up again."""
    return float(f"{x:.4g}")


def _decimals(x_E: np.ndarray) -> list[float]:
    """Through text: the shortest decimals that read back as the same float32."""
    return orjson.loads(orjson.dumps(x_E, option=orjson.OPT_SERIALIZE_NUMPY))
