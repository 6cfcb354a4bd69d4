"""The parts of one edge: straight up the residual stream, and moved by which heads.

    edge = residual-direct + attention-mediated
         = residual-direct + heads listed + other heads

(maths 7.4), and of what a small change of its source does:

    response = edge + query + key + norm + gate

(maths 22.4). Numbers come from the graph; hops, and whatever the graph does not list
for an edge, take the model (`jaxclt.explain`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxclt.errors import InputError
from jaxclt.graph.graph import Graph
from jaxclt.graph.nodes import (
    facts,
    find_column,
    find_row,
    labelled,
    node_label,
    node_name,
)
from jaxclt.graph.response_table import PARTS
from jaxclt.graph.shares import whole_input

__all__ = ["EdgeParts", "EdgeResponse", "check_edge", "edge_parts", "known_parts"]

Heads = tuple[tuple[int, int, float], ...]  # layer, number, what it moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeResponse:
    """What a small change of an edge's source does; parts are None where not known."""

    total: float
    query: float | None = None  # through what heads ask for
    key: float | None = None  # through what heads answer to
    norm: float | None = None  # through denominators
    gate: float | None = None  # through the target's own gate
    query_heads: Heads | None = None  # the strongest
    key_heads: Heads | None = None

    def parts(self, edge: float) -> list[tuple[str, float]]:
        """Name and size of each, `edge` being the part that the value is."""
        found = [("response", self.total)]
        if self.query is None:
            return found
        found.append(("  as by value", edge))
        for name, heads in (("query", self.query_heads), ("key", self.key_heads)):
            found.append((f"  {name}", getattr(self, name)))
            found += [(f"    head {l}.{h}", part) for l, h, part in heads or ()]
        return [
            *found,
            *((f"  {name}", getattr(self, name)) for name in ("norm", "gate")),
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeParts:
    """One edge and what it is made of; None is not known."""

    source: str
    target: str
    row: int  # of the graph
    col: int
    edge: float  # signed effect
    share: float  # of all that the target reads, counted without sign
    kept: bool  # by the graph's pruning
    activation: float | None  # of a target that is a feature
    direct: float | None  # residual-direct
    attention: float | None  # all that passed a head
    heads: Heads | None = None  # by the last head
    other_heads: float | None = None
    hops: tuple[float, ...] | None = None  # by heads passed, the last: that or more
    response: EdgeResponse | None = None
    source_label: str = ""  # what a feature does, in words
    target_label: str = ""

    def text(self) -> str:
        """A plain-text table, each part with its share of the edge."""
        parts: list[tuple[str, float]] = [("edge", self.edge)]
        if self.direct is not None and self.attention is not None:
            parts.append(("residual-direct", self.direct))
            parts.append(("attention-mediated", self.attention))
        for layer, head, load in self.heads or ():
            parts.append((f"  last head {layer}.{head}", load))
        if self.other_heads is not None:
            parts.append(("  other heads", self.other_heads))
        for k, part in enumerate(self.hops or ()):
            more = " or more" if k == len(self.hops or ()) - 1 else ""
            parts.append((f"{k}{more} hops", part))
        source = labelled(self.source, self.source_label)
        lines = [f"{source} -> {labelled(self.target, self.target_label)}"]
        lines += [_line(name, part, self.edge) for name, part in parts]
        if said := self.response:
            parts = said.parts(self.edge)
            lines += [_line(name, part, said.total) for name, part in parts]
        shown = "shown" if self.kept else "not shown, pruned"
        lines.append(f"{self.share:.2%} of what the target reads; {shown}")
        if self.activation is not None and self.activation < 0:
            does = "strengthens" if self.edge < 0 else "weakens"
            at = f"the target's activation, {self.activation:.4g}, is"
            lines.append(f"{at} below zero: the edge {does} it")
        if self.direct is None:
            lines.append("parts: not in this file; trace the prompt again")
        elif self.heads is None:
            lines.append("heads: not listed for this edge; trace with --heads N")
        if self.response is None:
            lines.append("response: not in this file; trace with --response")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return dataclasses.asdict(self)


def _line(name: str, part: float, whole: float) -> str:
    share = f"{part / whole:8.1%}" if whole else ""
    return f"{name:<20} {part:+12.4g} {share}".rstrip()


def edge_parts(graph: Graph, source: str, target: str) -> EdgeParts:
    """What a graph says about one of its edges.

    Args:
      graph: attributed; the graph itself, which has both readings.
      source: feature, error or token; see `jaxclt.graph.nodes` for the names.
      target: feature or target.

    Raises:
      InputError: if there is no such node or edge.
    """
    parts = known_parts(graph, source, target)
    check_edge(graph, parts)
    return parts


def check_edge(graph: Graph, parts: EdgeParts) -> None:
    """Raise InputError if an edge is zero by either reading."""
    if parts.edge == 0 and (parts.response is None or parts.response.total == 0):
        why = _why(graph, parts.row, parts.col)
        raise InputError(f"no edge {parts.source} -> {parts.target}: {why}")


def known_parts(graph: Graph, source: str, target: str) -> EdgeParts:
    """`edge_parts`, of edges that are zero too."""
    if graph.meta.reading != "value":
        raise InputError(
            "an edge is explained by both readings: give the graph itself, not what "
            "by_response made of it"
        )
    col, row = find_column(graph, source), find_row(graph, target)
    ends = col, graph.layout.node_of(row)
    names = [node_name(graph, node) for node in ends]
    labels = [node_label(graph, node) for node in ends]
    edge = float(graph.edge_RN[row, col])
    direct = attention = heads = other = None
    if graph.direct_RN is not None:
        direct = float(graph.direct_RN[row, col])
        attention = edge - direct
    if graph.heads is not None:
        (at,) = graph.heads.find(np.array([row]), np.array([col])).tolist()
        if at >= 0:
            heads, other = graph.heads.listed(at), float(graph.heads.rest_E[at])
    return EdgeParts(
        source=names[0],
        target=names[1],
        row=row,
        col=col,
        edge=edge,
        share=abs(edge) / max(float(whole_input(graph)[row]), 1e-30),
        kept=bool(graph.pruning.keep_edge_RN[row, col]),
        activation=float(graph.value_A[row]) if row < graph.n_features else None,
        direct=direct,
        attention=attention,
        heads=heads,
        other_heads=other,
        response=_response(graph, row, col),
        source_label=labels[0],
        target_label=labels[1],
    )


def _response(graph: Graph, row: int, col: int) -> EdgeResponse | None:
    """What the graph says of an edge's response, its parts if they are listed."""
    if graph.response is None:
        return None
    parts, total = graph.response.parts, float(graph.response.edge_RN[row, col])
    (at,) = parts.find(np.array([row]), np.array([col])).tolist()
    if at < 0:
        return EdgeResponse(total=total)
    sizes: dict[str, Any] = {
        part: float(getattr(parts, f"{part}_E")[at]) for part in PARTS
    }
    return EdgeResponse(total=total, **sizes)


def _why(graph: Graph, row: int, col: int) -> str:
    """Why an edge is zero."""
    if not graph.attributed_R[row]:
        return "the inputs of the target were not computed"
    if row < graph.n_features:
        source = facts(graph, col)
        if source["layer"] >= graph.layer_A[row]:
            return "a feature reads only what layers below it wrote"
        if source["pos"] > graph.pos_A[row]:
            return "the source comes after the target"
    if not graph.pruning.keep_N[col]:
        return "the source was pruned, or is no node in this convention"
    return "its effect is zero"
