"""`jaxclt explain`: how one edge of a traced prompt travelled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxclt.cli.compiled import use_compilation_cache
from jaxclt.cli.progress import lines
from jaxclt.errors import check_at_least
from jaxclt.files.json_text import to_json

__all__ = ["ExplainConfig", "run_explain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """How an edge travelled: straight up the residual stream, or moved by which heads.

    Nodes are named as on the page and in graph.json: layer:position:feature (12:5:345,
    or 12_345_5), "error 12:5", "embed 2"; a target by its number, its text or id:TOKEN.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Directory that trace wrote."""
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Feature, error or token the edge starts at."""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """Feature or target it leads to."""
    hops: bool = False
    """Load the model: also by the number of heads passed, and the last heads of any
    edge, whether trace listed them or not."""
    max_hops: int = 3
    """With --hops: this many and more are one part."""
    model: str = ""
    """With --hops: the model, if not where trace found it."""
    dictionary: str = ""
    """With --hops: the dictionary, if not where trace found it."""
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show tracebacks."""


def run_explain(config: ExplainConfig, say: Console) -> None:
    """Print the parts of the edge."""
    from jaxclt.graph.explain import edge_parts
    from jaxclt.io.dictionary import load_dictionary
    from jaxclt.io.graph_file import load_graph
    from jaxclt.io.model import load_model
    from jaxclt.trace.again import edge_parts_with_model

    check_at_least(1, max_hops=config.max_hops)
    graph = load_graph(config.directory / "graph.npz")
    parts = edge_parts(graph, config.source, config.target)
    if config.hops:
        use_compilation_cache()
        model = load_model(
            config.model or graph.meta.model,
            progress=lines(say),
        )
        name = config.dictionary or graph.meta.dictionary
        parts = edge_parts_with_model(
            graph,
            config.source,
            config.target,
            model=model,
            dictionary=load_dictionary(name, model),
            max_hops=config.max_hops,
        )
    if config.json:
        print(to_json(parts.to_dict()))  # noqa: T201
    else:
        Console().print(parts.text(), markup=False, highlight=False, soft_wrap=True)
