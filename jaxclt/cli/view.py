"""`jaxclt view`: the page of a traced prompt is written again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxclt.cli.common import answer, page_line
from jaxclt.cli.flags import AsJson, Debug, TracedDirectory
from jaxclt.cli.progress import Run
from jaxclt.errors import InputError

if TYPE_CHECKING:
    from jaxclt.graph.graph import Graph

__all__ = ["ViewFlags", "run_view"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewFlags:
    """Write the page of a traced prompt again: with other thresholds, with what
    validate found, beside another graph."""

    directory: TracedDirectory
    out: Path | None = None
    """Page to write; by default the directory's index.html."""
    node_threshold: float | None = None
    """Prune the saved graph again with this share of influence."""
    edge_threshold: float | None = None
    """Prune the saved graph again with this share of edge strength."""
    by: Literal["value", "response"] = "value"
    """What edges, influence and groups go by: what a node is made of, or what a small
    change does (of a graph traced with --response)."""
    compare: Path | None = None
    """Directory of a second graph to compare with."""
    features: Path | None = None
    """Feature files to embed: what `jaxclt features` wrote, or a folder of files
    {number}.json in Anthropic's format; by default the directory's features/."""
    suggest: bool = False
    """Group the shown features into supernodes, which the page then offers."""
    json: AsJson = False
    debug: Debug = False


def run_view(flags: ViewFlags, run: Run) -> None:
    """Write the page and say where."""
    del run
    from jaxclt.api import Page, show
    from jaxclt.graph.prune import prune
    from jaxclt.graph.response import by_response
    from jaxclt.io.graph_file import load_graph
    from jaxclt.trace import pages

    graph = load_graph(flags.directory / "graph.npz")
    if flags.node_threshold is not None or flags.edge_threshold is not None:
        old = graph.pruning
        _check_there(graph, flags.node_threshold)
        pruning = prune(
            graph,
            node_threshold=_given(flags.node_threshold, old.node_threshold),
            edge_threshold=_given(flags.edge_threshold, old.edge_threshold),
        )
        graph = dataclasses.replace(graph, pruning=pruning)
    if flags.by == "response":
        graph = by_response(graph)
    doc = show(graph).doc
    saved = flags.directory / "graph.json"
    if saved.exists():
        doc = pages.carry_over(doc, pages.read_graph(saved))
    if flags.features is not None:
        if not flags.features.is_dir():
            raise InputError(
                f"--features {flags.features} is not a folder: give what `jaxclt "
                "features` wrote, or a folder of feature files"
            )
        doc = pages.with_features(doc, flags.features)
    if flags.suggest:
        doc = pages.with_suggestions(doc, graph)
    other = flags.compare and pages.read_graph(flags.compare / "graph.json")
    html = pages.directory_page(flags.directory, doc=doc, compare=other)
    path = Page(html=html, doc=doc).save(flags.out or flags.directory / "index.html")
    groups = _grouped(doc, graph) if flags.suggest else []
    answer(flags.json, {"page": str(path)}, *groups, page_line(path))


def _grouped(doc: dict[str, Any], graph: Graph) -> list[str]:
    """A line for each suggested group: its name, and its members with their labels."""
    from jaxclt.errors import on_one_line
    from jaxclt.graph.nodes import labelled

    lines = []
    for name, *ids in doc["jaxclt"]["suggested_supernodes"]:
        places = [tuple(map(int, i.split("_"))) for i in ids]
        members = [
            labelled(f"{layer}:{pos}:{feature}", graph.meta.label(layer, pos, feature))
            for layer, feature, pos in places
        ]
        lines.append(f"{on_one_line(name)}: {', '.join(members)}")
    return lines


def _check_there(graph: Graph, node_threshold: float | None) -> None:
    """Raise InputError for a share of influence that a restricted graph lacks."""
    most = graph.pruning.node_threshold
    if graph.total_effect_KA is not None and (node_threshold or 0) > most:
        raise InputError(
            f"--node-threshold {node_threshold}: the directory holds what pruning at "
            f"{most:g} kept; trace the prompt again with --save full"
        )


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
