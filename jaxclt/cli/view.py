"""`jaxclt view`: the page of a traced prompt again; registered in cli."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxclt.errors import InputError
from jaxclt.files.json_text import to_json

__all__ = ["ViewConfig", "run_view"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Write the page of a traced prompt again: with other thresholds, with what
    validate found, beside another graph."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Directory that trace wrote."""
    out: Path | None = None
    """Page to write; the directory's index.html if not given."""
    node_threshold: float | None = None
    """Prune the saved graph again with this share of influence."""
    edge_threshold: float | None = None
    """Prune the saved graph again with this share of edge strength."""
    compare: Path | None = None
    """Directory of a second graph to compare with."""
    features: Path | None = None
    """Feature files to embed: what `jaxclt features` wrote, or a folder of files
    {number}.json in Anthropic's format; the directory's own features/ if not given."""
    suggest: bool = False
    """Group the shown features into supernodes, which the page then offers."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


def run_view(config: ViewConfig, say: Console) -> None:
    """Write the page and say where."""
    del say
    from jaxclt.api import Page, show
    from jaxclt.graph.prune import prune
    from jaxclt.io.graph_file import load_graph
    from jaxclt.trace import pages

    graph = load_graph(config.directory / "graph.npz")
    if config.node_threshold is not None or config.edge_threshold is not None:
        old = graph.pruning
        pruning = prune(
            graph,
            node_threshold=_given(config.node_threshold, old.node_threshold),
            edge_threshold=_given(config.edge_threshold, old.edge_threshold),
        )
        graph = dataclasses.replace(graph, pruning=pruning)
    doc = show(graph).doc
    saved = config.directory / "graph.json"
    if saved.exists():
        doc = pages.carry_over(doc, pages.read_graph(saved))
    if config.features is not None:
        if not config.features.is_dir():
            raise InputError(
                f"--features {config.features} is no folder: give what `jaxclt "
                "features` wrote, or a folder of feature files"
            )
        doc = pages.with_features(doc, config.features)
    if config.suggest:
        doc = pages.with_suggestions(doc, graph)
    other = config.compare and pages.read_graph(config.compare / "graph.json")
    html = pages.directory_page(config.directory, doc=doc, compare=other)
    path = Page(html=html, doc=doc).save(config.out or config.directory / "index.html")
    if config.json:
        print(to_json({"page": str(path)}))  # noqa: T201
    else:
        Console().print(f"page: {path.resolve().as_uri()}")


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
